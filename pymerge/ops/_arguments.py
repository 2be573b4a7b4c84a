"""A `DeltaRule` as the arguments of the torch operators."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from pymerge.ops.delta_rule import Cut, DeltaRule


def mask_arguments(rule: DeltaRule, *, wanted: bool = True) -> dict[str, Any]:
    """keep and keys (64-bit keys as the signed integers of torch schemas)."""
    if rule.keep is None or rule.keys is None or not wanted:
        return {"keep": None, "keys": None}
    return {"keep": list(rule.keep), "keys": [k - 2**64 if k >= 2**63 else k for k in rule.keys]}


def _cut_tensors(cut: Cut | None, tasks: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    if cut is None:
        return None, None
    if not cut.theta:
        return torch.empty(tasks, 0, device=device), torch.empty(tasks, 0, dtype=torch.int64, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the bytes are read-only, and nobody writes to them
        theta = torch.frombuffer(cut.theta, dtype=torch.float32).reshape(tasks, -1)
        index = torch.frombuffer(cut.index, dtype=torch.int64).reshape(tasks, -1)
    return theta.to(device), index.to(device)


def selection_arguments(rule: DeltaRule, device: torch.device) -> dict[str, Any]:
    tasks = len(rule.weights)
    top_theta, top_index = _cut_tensors(rule.top_cut, tasks, device)
    skip_theta, skip_index = _cut_tensors(rule.skip_cut, tasks, device)
    return {
        **mask_arguments(rule),
        "row_length": rule.row_length or 0,
        "top_theta": top_theta,
        "top_index": top_index,
        "skip_theta": skip_theta,
        "skip_index": skip_index,
    }


def weight_arguments(rule: DeltaRule) -> dict[str, Any]:
    return {"weights": list(rule.weights), "rescales": None if rule.rescales is None else list(rule.rescales)}
