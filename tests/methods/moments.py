"""Moments of given rows, as statistics keep them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from pymerge.methods.base import TaskGroup, TensorInfo
from pymerge.statistics.moments import Accumulator, Moments


def moments_of(x: Tensor, dtype: torch.dtype = torch.float64) -> Moments:
    """Of rows X [N, n]: kept where they are few, else summed."""
    accumulator = Accumulator("x", dtype)
    accumulator.add(x)
    return accumulator.finish()


def group_of(base: Tensor | None, tuned: Sequence[Tensor], rows: Sequence[Tensor] | None, name: str = "w") -> TaskGroup:
    """A matrix and the rows that each model's layer has seen."""
    info = TensorInfo(name=name, shape=tuple(tuned[0].shape), tasks=len(tuned))
    inputs = None if rows is None else tuple(moments_of(x) for x in rows)
    return TaskGroup(info=info, base=base, tuned=tuple(tuned), inputs=inputs)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def read_acts(path: Path) -> list[dict[str, Tensor]]:
    """The activations in a golden file: of each task, module -> X [N, n]."""
    acts: dict[int, dict[str, Tensor]] = {}
    with safe_open(os.fspath(path), "pt") as file:
        for key in file.keys():
            if key.startswith("acts/task"):
                task, module = key.removeprefix("acts/task").split("/", 1)
                acts.setdefault(int(task), {})[module] = file.get_tensor(key)
    return [acts[t] for t in sorted(acts)]


def read_tensor(path: Path, key: str) -> Tensor:
    with safe_open(os.fspath(path), "pt") as file:
        return file.get_tensor(key)
