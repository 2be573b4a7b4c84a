"""Small transformers models whose tasks speak different words (or paint with different colours), merged by ESM++."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pymerge
from pymerge.runtime import esmpp

TASKS, WORDS, LENGTH = 3, 12, 9
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS = ("lm_head", "classifier")
KINDS = ("bert", "vit", "llama", "gpt2")


def make(kind: str) -> Any:
    """A model with random weights."""
    import transformers

    tf: Any = transformers
    vocabulary = TASKS * WORDS + 1
    if kind == "vit":
        return tf.ViTForImageClassification(tf.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=7))
    if kind == "bert":
        config = tf.BertConfig(**SIZES, vocab_size=vocabulary, num_labels=7)
        return tf.BertForSequenceClassification(config)
    if kind == "gpt2":
        size: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
        return tf.GPT2LMHeadModel(tf.GPT2Config(**size, vocab_size=vocabulary, bos_token_id=0, eos_token_id=None))
    config = tf.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=vocabulary, eos_token_id=None, pad_token_id=0)
    return tf.LlamaForCausalLM(config)


def inputs(kind: str, task: int, count: int, seed: int = 0) -> dict[str, Tensor]:
    """Samples of one task."""
    g = torch.Generator().manual_seed(100 * seed + task)
    if kind == "vit":
        colour = torch.nn.functional.one_hot(torch.tensor(task), 3)[:, None, None]
        return {"pixel_values": 2.0 * colour + 0.5 * torch.randn(count, 3, 8, 8, generator=g)}
    words = torch.randint(1 + task * WORDS, 1 + (task + 1) * WORDS, (count, LENGTH), generator=g)
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}


@dataclass(frozen=True)
class Merged:
    kind: str
    out: Path
    models: list[Path]

    def individual(self, task: int) -> Any:
        return type(make(self.kind)).from_pretrained(self.models[task], dtype="auto").eval()

    def plain(self) -> Any:
        """The merged model without experts."""
        return type(make(self.kind)).from_pretrained(self.out, dtype="auto").eval()

    def dense(self, task: int) -> Any:
        """The merged model with W + B A in the place of W."""
        model, experts = self.plain(), load_file(self.out / esmpp.EXPERTS)
        names = {key.removesuffix(".A") for key in experts if key.endswith(".A")}
        layers = esmpp.layers_of(model, dict.fromkeys(names), self.out)
        with torch.no_grad():
            for name, layer in layers.items():
                weight: Any = layer.weight
                product = experts[f"{name}.B"][task].float() @ experts[f"{name}.A"][task].float()
                weight += (product.mT if type(layer).__name__ == "Conv1D" else product).to(weight)
        return model


def merged(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **given: Any) -> Merged:
    """Tasks that differ from the base in the matrices of their linear layers."""
    torch.manual_seed(0)
    model = make(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 8
        if kind != "vit":  # words of one task have something in common
            words: Any = model.get_input_embeddings().weight
            words[1:] += torch.randn(TASKS, 1, 32).expand(-1, WORDS, -1).reshape(-1, 32)
    model.to(dtype).save_pretrained(folder / "base")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    paths, statistics = [], []
    for task in range(TASKS):
        model.load_state_dict(state)
        g = torch.Generator().manual_seed(task)
        with torch.no_grad():
            for name, layer in model.named_modules():
                if (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D") and name not in HEADS:
                    weight: Any = layer.weight
                    weight += (0.6 * weight.float().std() * torch.randn(weight.shape, generator=g)).to(dtype)
        paths.append(folder / f"m{task}")
        model.save_pretrained(paths[-1])
        statistics.append(folder / f"m{task}.stats.safetensors")
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(kind, task, 32, seed=9).items()}
        pymerge.observe(paths[-1], [batch]).save(statistics[-1])
    pymerge.merge(folder / "base", paths, method="esmpp", statistics=statistics, out=folder / "out", **given)
    return Merged(kind, folder / "out", paths)
