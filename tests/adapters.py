"""PEFT adapter folders for tests, written by the format's definition."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SHAPES = {
    "model.embed_tokens.weight": (40, 24),
    "model.layers.0.self_attn.q_proj.weight": (24, 24),
    "model.layers.0.mlp.up_proj.weight": (56, 24),
    "model.layers.0.mlp.down_proj.weight": (24, 56),
    "model.layers.0.norm.weight": (24,),
    "lm_head.weight": (40, 24),
}
TARGETS = tuple(name.removesuffix(".weight") for name in SHAPES if "proj" in name)


def random_factors(seed: int, shapes: Mapping[str, tuple[int, ...]], rank: int = 4) -> dict[str, Tensor]:
    """module.lora_A.weight [rank, in] and module.lora_B.weight [out, rank] for each weight [out, in]."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, (m, n) in shapes.items():
        module = name.removesuffix(".weight")
        factors[f"{module}.lora_A.weight"] = torch.randn(rank, n, generator=generator) / n**0.5
        factors[f"{module}.lora_B.weight"] = torch.randn(m, rank, generator=generator) / 10
    return factors


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], base: Path | str = "gone", **config: Any) -> Path:
    """An adapter folder; the scale is 1 unless lora_alpha says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = next((t.shape[0] for name, t in tensors.items() if "lora_A" in name), 4)
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(said | config))
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def adapted(
    base: Mapping[str, Tensor], factors: Mapping[str, Tensor], scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """The whole model that an adapter means: base + scale B A."""
    model = {name: tensor.to(dtype) for name, tensor in base.items()}
    for key, a in factors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            b = factors[f"{module}.lora_B.weight"]
            model[f"{module}.weight"] = model[f"{module}.weight"] + scale * b.to(dtype) @ a.to(dtype)
    return model
