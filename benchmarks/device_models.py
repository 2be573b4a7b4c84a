"""Llama-shaped bfloat16 checkpoints made on a device: a 7B model in seconds, where NumPy takes minutes.

A base and fine-tuned models; updates have the spectra of structured.py: a power law on directions that tasks share,
another on directions of their own, and noise. The same bytes on the same kind of device.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from side_by_side.checkpoints import header, tensors
from structured import BASE_STD, DECAY, DIRECTIONS, ENERGY, STD
from torch import Tensor

Config = dict[str, Any]


def llama(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool) -> Config:
    """config.json of a Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }


def parameters(config: Config) -> int:
    return sum(torch.Size(shape).numel() for _, shape in tensors(config))


def spread(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[m, k] and [k, n]: power-law directions whose product has entries of variance 1."""
    k = max(1, min(shape) // DIRECTIONS)
    spectrum = torch.arange(1, k + 1, device=generator.device) ** -DECAY
    left = torch.randn(shape[0], k, generator=generator, device=generator.device)
    right = torch.randn(k, shape[1], generator=generator, device=generator.device)
    return left * (spectrum / spectrum.norm()), right


def values(shape: tuple[int, ...], tasks: int, generator: torch.Generator) -> list[Tensor]:
    """The base's tensor and the tuned ones'."""

    def noise() -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    if len(shape) == 1:
        base = 1 + 0.05 * noise()
        return [base, *(base + STD * noise() for _ in range(tasks))]
    base, (left, right) = BASE_STD * noise(), spread(shape, generator)
    found = [base]
    for _ in range(tasks):
        tuned = noise().mul_(ENERGY["noise"] ** 0.5)
        tuned.addmm_(left, right, alpha=ENERGY["shared"] ** 0.5)
        tuned.addmm_(*spread(shape, generator), alpha=ENERGY["own"] ** 0.5)
        found.append(tuned.mul_(STD).add_(base))
    return found


def write(x: Tensor, file: BinaryIO) -> None:
    file.write(x.bfloat16().cpu().view(torch.uint8).numpy().data)


def make(root: Path, config: Config, tasks: int, device: str) -> None:
    """root/base, root/m1, ... of one file each."""
    entries = list(tensors(config))
    generator = torch.Generator(device).manual_seed(0)
    with ExitStack() as open_files:
        files = []
        for name in ("base", *(f"m{t}" for t in range(1, tasks + 1))):
            (root / name).mkdir(parents=True)
            (root / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            files.append(open_files.enter_context(open(root / name / "model.safetensors", "wb")))
            files[-1].write(header(entries))
        for _, shape in entries:
            for x, file in zip(values(shape, tasks, generator), files, strict=True):
                write(x, file)
