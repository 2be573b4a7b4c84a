"""Small Llamas as mergekit reads them, and the doors' command lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tests.models import write_model

ROOT = Path(__file__).parents[2]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def llama_tensors(seed: int) -> dict[str, Tensor]:
    """A fine-tuned child (seed > 0) of one base (seed 0)."""
    shapes = {"model.embed_tokens.weight": (32, 16), "lm_head.weight": (32, 16), "model.norm.weight": (16,)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{x}_proj.weight": (16, 16) for x in "qkvo"}
        shapes |= {f"{at}.mlp.{x}_proj.weight": (24, 16) for x in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (16, 24)}
        shapes |= {f"{at}.{x}_layernorm.weight": (16,) for x in ("input", "post_attention")}
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=common) for name, shape in shapes.items()}
    return {name: t + (0.1 * torch.randn(t.shape, generator=own) if seed else 0) for name, t in base.items()}


def write_llamas(folder: Path, **changes: Mapping[str, Tensor]) -> None:
    """Folders base, a, b; more of them by name: a's tensors with changes."""
    for seed, name in enumerate(("base", "a", "b")):
        write_model(folder / name, llama_tensors(seed), CONFIG)
    for name, changed in changes.items():
        write_model(folder / name, llama_tensors(1) | dict(changed), CONFIG)


def door(name: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs pymerge-yaml or pymerge-multi ("yaml", "multi") in a folder."""
    code = f"from pymerge.cli.mergekit import {name}_main; {name}_main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True
    )


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "merge.json").read_text())
