"""Two classifiers of each kind, trained from different seeds on disjoint halves of the ten digits."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

import pymerge
from pymerge.demo.data import DIGITS, digits, shifted

CLASSES = 10
HALVES = range(5), range(5, 10)
HELD_OUT = 200  # training images that no model is trained on: alpha is chosen on them
GROUPS = 8  # of every GroupNorm


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Kept beside the models, so that another schedule trains again."""

    epochs: int
    rate: float
    decay: float
    seed: int = 0  # of the start and of the order of images; in SCHEDULES of the first half, the second's is one more


BATCH = 64
SCHEDULES = {"conv": Schedule(epochs=12, rate=3e-3, decay=0.5), "vit": Schedule(epochs=30, rate=6e-3, decay=1.0)}
TITLES = {"conv": "conv net", "vit": "ViT"}


def conv_net(width: int = 128) -> nn.Module:
    """Three convolutions with GroupNorm, then a Linear on the means of their channels: 0.3 M parameters."""
    return nn.Sequential(
        *convolution(1, width),
        *convolution(width, width),
        nn.MaxPool2d(2),
        *convolution(width, width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, CLASSES),
    )


def convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.GroupNorm(GROUPS, outputs), nn.ReLU()


def vision_transformer() -> nn.Module:
    """Two layers of width 128 over four patches of 4 x 4: 0.3 M parameters."""
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.08,
        id2label=dict(enumerate(DIGITS)),
    )
    return ViTForImageClassification(config)


KINDS: dict[str, Callable[[], nn.Module]] = {"conv": conv_net, "vit": vision_transformer}


def logits(model: nn.Module, images: Tensor) -> Tensor:
    found = model(images)
    return found if isinstance(found, Tensor) else found.logits


def splits() -> tuple[Tensor, Tensor, Tensor]:
    """Indices of training, validation and test images, all ten digits in each."""
    return digits().train[:-HELD_OUT], digits().train[-HELD_OUT:], digits().test


def train(kind: str, known: Sequence[int], schedule: Schedule) -> nn.Module:
    """A model that knows these digits: it is trained on their images alone, on the logits of these classes."""
    classes, place = torch.tensor(known), torch.zeros(CLASSES, dtype=torch.int64)
    place[classes] = torch.arange(len(known))
    images = splits()[0]
    images = images[torch.isin(digits().digits[images], classes)]
    generator = torch.Generator().manual_seed(schedule.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(schedule.seed)
        model = KINDS[kind]()
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.rate, weight_decay=schedule.decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.rate, total_steps=schedule.epochs * steps, pct_start=0.2
    )
    for _ in range(schedule.epochs):
        order = images[torch.randperm(len(images), generator=generator)]
        for batch in order[: steps * BATCH].split(BATCH):
            shift = torch.randint(0, 9, (BATCH,), generator=generator)
            found = logits(model, shifted()[shift, batch])[:, classes]
            loss = functional.cross_entropy(found, place[digits().digits[batch]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
    return model.eval()


def trained(kind: str, half: int, folder: Path) -> nn.Module:
    """The model of one half in `folder`/KIND-HALF.safetensors; the two halves' seeds differ, and so do their starts."""
    schedule = SCHEDULES[kind]
    return kept(folder / f"{kind}-{half}.safetensors", kind, HALVES[half], replace(schedule, seed=schedule.seed + half))


def kept(path: Path, kind: str, known: Sequence[int], schedule: Schedule) -> nn.Module:
    """The model in a file, trained where it is not there from the same digits and schedule."""
    mark, settings = path.with_suffix(".json"), {"known": list(known)} | asdict(schedule)
    if mark.is_file() and json.loads(mark.read_text()) == settings:
        model = KINDS[kind]().eval()
        model.load_state_dict(load_file(path))
        return model
    mark.unlink(missing_ok=True)
    model = train(kind, known, schedule)
    save_file(model.state_dict(), path)
    mark.write_text(json.dumps(settings))
    return model


def accuracy(model: nn.Module, images: Tensor, known: Sequence[int] = range(CLASSES)) -> float:
    """Share of the images of these digits whose digit is the largest of these digits' logits."""
    with torch.inference_mode():
        return right(logits(model, digits().images[images]), digits().digits[images], known)


def right(found: Tensor, target: Tensor, known: Sequence[int]) -> float:
    """Of logits [N, 10] and digits [N]; see accuracy."""
    classes = torch.tensor(known)
    asked = torch.isin(target, classes)
    return (classes[found[asked][:, classes].argmax(-1)] == target[asked]).double().mean().item()


def loss(model: nn.Module, images: Tensor) -> float:
    """Mean cross-entropy over all ten digits."""
    with torch.inference_mode():
        return functional.cross_entropy(logits(model, digits().images[images]), digits().digits[images]).item()


def spec(kind: str, model: nn.Module, tie_heads: bool = True) -> pymerge.align.Spec:
    """The groups of units of a model."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if kind == "conv":
        return pymerge.align.spec_for(shapes, {"num_groups": GROUPS}, "chain")
    config: Any = model.config
    found = pymerge.align.spec_for(shapes, config.to_dict(), tie_heads=tie_heads)
    # The head sees the residual stream of one token an image; all layers see it of all tokens.
    layers = [name.removesuffix(".weight") for name in shapes if name.endswith(("q_proj.weight", "fc1.weight"))]
    seen = tuple(pymerge.align.Tap(module=layer) for layer in layers)
    groups = (replace(g, taps=g.taps + seen) if g.name == "residual" else g for g in found.groups)
    return replace(found, groups=tuple(groups))
