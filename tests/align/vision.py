"""Small random vision models with the names of torchvision, timm and transformers, and what they compute."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F


def batch_norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels)


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


class Block(nn.Module):
    """A ResNet block with torchvision's names; `stages` (kernel, width) of its convolutions."""

    def __init__(self, inputs: int, sizes: list[tuple[int, int]], stride: int, norm, groups: int, shortcut: str):
        super().__init__()
        self.count, outputs, width = len(sizes), sizes[-1][1], inputs
        for i, (kernel, size) in enumerate(sizes, 1):
            middle = groups if kernel > 1 else 1
            conv = nn.Conv2d(width, size, kernel, stride if i == 1 else 1, kernel // 2, groups=middle, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", norm(size))
            width = size
        self.side = shortcut
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.add_module(shortcut, nn.Sequential(conv, norm(outputs)))
        else:
            self.add_module(shortcut, nn.Sequential())

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.count + 1):
            y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
            y = F.relu(y) if i < self.count else y
        return F.relu(y + self.get_submodule(self.side)(x))


class ResNet(nn.Module):
    """Stages (width, blocks); basic blocks, or bottleneck blocks with `groups`."""

    def __init__(
        self,
        stages: tuple[tuple[int, int], ...] = ((8, 2), (16, 2)),
        norm: Callable[[int], nn.Module] = batch_norm,
        bottleneck: bool = False,
        groups: int = 1,
        shortcut: str = "downsample",
        head: str | None = "fc",
        deep_stem: bool = False,
        channels: int = 3,
        classes: int = 5,
    ) -> None:
        super().__init__()
        width, self.stages, self.head = stages[0][0], len(stages), head
        self.conv1: nn.Module = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        if deep_stem:
            conv = nn.Conv2d(12, width, 3, padding=1, bias=False)
            self.conv1 = nn.Sequential(nn.Conv2d(channels, 12, 3, padding=1, bias=False), norm(12), nn.ReLU(), conv)
        self.bn1 = norm(width)
        for s, (size, blocks) in enumerate(stages, 1):
            sizes = [(1, size), (3, size), (1, 4 * size)] if bottleneck else [(3, size), (3, size)]
            layers = []
            for b in range(blocks):
                layers.append(Block(width, sizes, 2 if s > 1 and b == 0 else 1, norm, groups, shortcut))
                width = sizes[-1][1]
            self.add_module(f"layer{s}", nn.Sequential(*layers))
        if head:
            self.add_module(head, nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for s in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{s}")(x)
        return self.get_submodule(self.head)(x.mean((2, 3))) if self.head else x


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        if qk_norm:
            self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class VitBlock(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, qk_norm)
        self.ls1, self.ls2 = LayerScale(width), LayerScale(width)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)))))


class TimmVit(nn.Module):
    """A ViT with timm's names."""

    def __init__(
        self, size=8, patch=4, chans=3, width=32, depth=2, heads=4, classes: int = 5, qk_norm=False, distilled=False
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.tokens = 1
        if distilled:
            self.dist_token, self.tokens = nn.Parameter(torch.zeros(1, 1, width)), 2
        self.pos_embed = nn.Parameter(torch.randn(1, (size // patch) ** 2 + self.tokens, width) * 0.02)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(chans, width, patch, patch)
        self.blocks = nn.Sequential(*(VitBlock(width, heads, qk_norm) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        if classes:
            self.head = nn.Linear(width, classes)
            if distilled:
                self.head_dist = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.proj(x).flatten(2).mT
        tokens = [self.cls_token, *([self.dist_token] if self.tokens == 2 else [])]
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in tokens), x], 1) + self.pos_embed
        x = self.norm(self.blocks(x))
        if not hasattr(self, "head"):
            return x
        return self.head(x[:, 0]) + (self.head_dist(x[:, 1]) if self.tokens == 2 else 0)


class Vgg(nn.Module):
    """torchvision's names: features, then classifier on all positions of the last channels."""

    def __init__(
        self, norm: Callable[[int], nn.Module] | None = None, pooled: int = 2, channels: int = 3, classes: int = 5
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((channels, 8), (8, 12), (12, 12)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), *([norm(outputs)] if norm else []), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(pooled))
        self.classifier = nn.Sequential(
            nn.Linear(12 * pooled**2, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class Named(nn.Module):
    """Modules called by the order of their names here, with ReLU behind norms or layers, flattened before a Linear."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        modules = list(self.children())
        for module, following in zip(modules, [*modules[1:], None], strict=True):
            x = module(x.flatten(1) if isinstance(module, nn.Linear) else x)
            x = x if following is None or "Norm" in type(following).__name__ else F.relu(x)
        return x


def mlp() -> nn.Module:
    return Named(fc1=nn.Linear(192, 24), fc2=nn.Linear(24, 24), bn2=nn.BatchNorm1d(24), fc3=nn.Linear(24, 5))


def mobile() -> nn.Module:
    """Depthwise convolutions between plain ones."""
    return Named(
        conv1=nn.Conv2d(3, 8, 3), bn1=nn.BatchNorm2d(8),
        conv2=nn.Conv2d(8, 8, 3, groups=8), bn2=nn.BatchNorm2d(8),
        conv3=nn.Conv2d(8, 12, 1), conv4=nn.Conv2d(12, 12, 3, groups=12), conv5=nn.Conv2d(12, 6, 1),
        head=nn.Linear(6 * 4, 5),
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`make` builds the model; family and config are what `spec_for` gets."""

    make: Callable[[], nn.Module]
    family: str
    config: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "resnet-bn": Case(ResNet, "resnet"),
    "resnet-bn-shortcut": Case(lambda: ResNet(shortcut="shortcut", head="linear"), "resnet"),
    "resnet-bn-bottleneck": Case(lambda: ResNet(bottleneck=True), "resnet"),
    "resnet-gn": Case(lambda: ResNet(norm=group_norm), "resnet", {"num_groups": 4}),
    "resnet-gn-bottleneck": Case(lambda: ResNet(norm=group_norm, bottleneck=True), "resnet", {"num_groups": 4}),
    "resnet-deep-stem": Case(lambda: ResNet(deep_stem=True), "resnet"),
    "resnet-no-head": Case(lambda: ResNet(head=None), "resnet"),
    "resnext": Case(lambda: ResNet(bottleneck=True, groups=4), "resnet"),
    "vgg": Case(Vgg, "chain"),
    "vgg-bn": Case(lambda: Vgg(batch_norm), "chain"),
    "vgg-gn": Case(lambda: Vgg(group_norm), "chain", {"num_groups": 4}),
    "vgg-pooled": Case(lambda: Vgg(pooled=1), "chain"),
    "mlp": Case(mlp, "chain"),
    "mobile": Case(mobile, "chain"),
    "vit-timm": Case(TimmVit, "vit", {"num_heads": 4}),
    "vit-timm-qk-norm": Case(lambda: TimmVit(qk_norm=True), "vit", {"num_heads": 4}),
    "vit-timm-distilled": Case(lambda: TimmVit(distilled=True), "vit", {"num_heads": 4}),
    "vit-timm-no-head": Case(lambda: TimmVit(classes=0), "vit", {"num_heads": 4}),
}


def randomise(model: nn.Module) -> nn.Module:
    """Every parameter and statistic differs from unit to unit."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_((torch.rand_like(tensor) - 0.5) * (1.6 if tensor.ndim == 1 else 0.4))
    return model.eval()


class Tiny:
    """A model of CASES: its tensors, and what it computes with others in their place."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.case = CASES[name]
        self.model = randomise(self.case.make().to(dtype))
        self.tensors = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.inputs = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)

    def output(self, tensors: Mapping[str, Tensor]) -> Tensor:
        self.model.load_state_dict(tensors)
        with torch.inference_mode():
            return self.model(self.inputs)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE = SMALL | {"image_size": 8, "patch_size": 4}
TEXT = SMALL | {"vocab_size": 40, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"}
BOTTLENECK = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "bottleneck"}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", IMAGE),
    "vit-base": ("ViTModel", IMAGE),
    "deit": ("DeiTForImageClassificationWithTeacher", IMAGE),
    "clip": ("CLIPModel", {"vision_config": IMAGE, "text_config": TEXT, "projection_dim": 16}),
    "clip-vision": ("CLIPVisionModelWithProjection", IMAGE | {"projection_dim": 16}),
    "clip-vision-base": ("CLIPVisionModel", IMAGE),
    "clip-text": ("CLIPTextModelWithProjection", TEXT | {"projection_dim": 16}),
    "clip-text-base": ("CLIPTextModel", TEXT),
    "clip-classifier": ("CLIPForImageClassification", {"vision_config": IMAGE, "text_config": TEXT}),
    "resnet": ("ResNetForImageClassification", RESNET),
    "resnet-bottleneck": ("ResNetForImageClassification", BOTTLENECK),
    "resnet-base": ("ResNetModel", RESNET),
}


class TinyTransformers:
    """A model of TRANSFORMERS in a folder: its tensors and config as stored."""

    def __init__(self, name: str, folder: Path, dtype: torch.dtype) -> None:
        import transformers

        torch.manual_seed(0)
        cls_name, kwargs = TRANSFORMERS[name]
        self.cls, self.folder, self.dtype = getattr(transformers, cls_name), folder, dtype
        self.model = randomise(self.cls(self.cls.config_class(**kwargs)).to(dtype))
        self.model.save_pretrained(folder)
        self.tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
        self.config = json.loads((folder / "config.json").read_text())

    def output(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """All floating outputs as one vector; of towers with a projection what it gives, of models without a head the
        last hidden state. The tensors are named as in the checkpoint."""
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, self.folder / "model.safetensors", metadata={"format": "pt"})
        return self.compute(self.cls.from_pretrained(self.folder, dtype=self.dtype).eval())

    def compute(self, model: nn.Module) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(3, 3, 8, 8, generator=generator).to(self.dtype)
        ids = torch.randint(3, 40, (3, 9), generator=generator)
        kinds = {"vision": {"pixel_values": images}, "text": {"input_ids": ids}}
        inputs = {"CLIPModel": kinds["vision"] | kinds["text"]}.get(
            self.cls.__name__, kinds["text" if "Text" in self.cls.__name__ else "vision"]
        )
        with torch.inference_mode():
            found = model(**inputs)
        if self.cls.__name__.endswith(("WithProjection", "VisionModel", "TextModel", "ViTModel", "ResNetModel")):
            return found[0]
        return torch.cat([v.flatten() for v in found.values() if isinstance(v, Tensor) and v.is_floating_point()])


class InMemory(TinyTransformers):
    """The same by the names of its modules, which are not those of the checkpoint."""

    def __init__(self, name: str, folder: Path, dtype: torch.dtype) -> None:
        super().__init__(name, folder, dtype)
        self.tensors = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def output(self, tensors: Mapping[str, Tensor]) -> Tensor:
        self.model.load_state_dict(tensors)
        return self.compute(self.model)
