"""The model of one task, from a model merged by EMR, its masks and the base."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pymerge.errors import InputError
from pymerge.runtime.tasks import number_of

MASKS = "emr_masks.safetensors"
SCALES = "emr.scales"


def load(merged: str | Path, base: str | Path | Mapping[str, Tensor], task: int | str) -> dict[str, Tensor]:
    """State dict of one task's model: W_0 + l_t M_t (W - W_0), computed in float32, in the merged model's dtypes.

    merged  folder that pymerge wrote with merge_method emr
    base    the base model of the merge: a folder, a safetensors file or a state dict
    task    number of the model in the merge, from 0, or its path as the recipe gave it
    Tensors without a mask (excluded ones, integers, rows that the models do not share) are the merged model's.
    Raises  InputError (no masks there, no such task, a tensor that the base lacks)."""
    path = Path(merged) / MASKS
    if not path.is_file():
        raise InputError(f"{merged}: no {MASKS} here: not a model merged with merge_method emr")
    weights, origin = tensors_of(merged), tensors_of(base)
    result: dict[str, Tensor] = {}
    with safe_open(path, "pt") as masks:
        number = number_of(task, json.loads(masks.metadata()["tasks"]))
        scale, masked = float(masks.get_tensor(SCALES)[number]), set(masks.keys())
        for name, read in weights.items():
            weight = read()
            if name in masked:
                if name not in origin:
                    raise InputError(f"{name}: merged, yet absent from the base")
                bits = masks.get_slice(name)[number : number + 1].reshape(-1)
                weight = of_task(weight, origin[name](), bits, scale)
            result[name] = weight
    return result


def of_task(weight: Tensor, base: Tensor, bits: Tensor, scale: float) -> Tensor:
    """One tensor of a task's model; bits as in the mask file, of the entries that were merged."""
    mask = ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(-1).bool()
    count = min(len(mask), weight.numel(), base.numel())
    flat, start = weight.reshape(-1).clone(), base.reshape(-1)[:count].float()
    flat[:count] = (start + scale * mask[:count] * (flat[:count].float() - start)).to(weight.dtype)
    return flat.reshape(weight.shape)


def tensors_of(model: str | Path | Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Name -> a function that reads the tensor."""
    if isinstance(model, Mapping):
        return {name: (lambda tensor=tensor: tensor) for name, tensor in model.items()}
    path = Path(model)
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []
        files = [path / name for name in names or ["model.safetensors"]]
    else:
        files = [path]
    found: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        if not file.is_file():
            raise InputError(f"{model}: {file.name} is not there: a folder or file of safetensors is needed")
        with safe_open(file, "pt") as opened:
            found |= {name: reader(file, name) for name in opened.keys()}
    return found


def reader(file: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(file, "pt") as opened:
            tensor: Any = opened.get_tensor(name)
        return tensor

    return read
