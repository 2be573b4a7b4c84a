"""EMR-Merging: elect one update, and tell each task which of its entries to use (mask) and how much (rescale)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.methods.base import Combine, TaskGroup, TensorInfo, register
from pymerge.methods.blocks import BLOCK, blocks, in_blocks
from pymerge.methods.surveyed import SUM_BLOCK

if TYPE_CHECKING:
    from torch import Tensor


@register("emr")
@dataclass(frozen=True, kw_only=True)
class Emr(Combine):
    """W = W_0 + E, and beside it a mask M_t and a scale l_t for each task, whose model is W_0 + l_t M_t (W - W_0).

    g = 1 where sum_t D_t > 0, else -1; E = g times the largest |D_t| of the tasks with D_t g > 0, 0 where there is
    none; M_t = D_t g > 0; l_t = sum_p mean |D_t^p| / sum_p mean |E^p M_t^p| with means over each parameter p, 0 where
    nothing of a task is used. The masks, a bit an entry, and the scales are written to emr_masks.safetensors in the
    output folder, for which the inputs are read a second time; `pymerge.runtime.emr.load` makes a task's model of them.
    """

    paper = "arXiv 2405.17461"
    unit = "entries"
    beside = "masks"

    def combine(self, group: TaskGroup) -> Tensor:
        return in_blocks(group, elected)

    def workspace(self, info: TensorInfo) -> int:
        return 24 * min(BLOCK, info.numel)


def elected(group: TaskGroup) -> Tensor:
    """E, float32, of the group's shape."""
    sign = signs(group)
    return sizes(group, sign).mul_(sign)


def signs(group: TaskGroup) -> Tensor:
    import torch

    total = group.delta(0)
    for t in range(1, len(group.tuned)):
        total += group.delta(t)
    return torch.where(total > 0, 1.0, -1.0)


def sizes(group: TaskGroup, sign: Tensor) -> Tensor:
    """|E|"""
    import torch

    size = torch.zeros_like(sign)
    for t in range(len(group.tuned)):
        torch.maximum(size, group.delta(t).mul_(sign), out=size)
    return size


@dataclass(frozen=True, kw_only=True)
class TaskMasks:
    """What the tasks use of a range of entries.

    bits    uint8 [T, ceil(n / 8)]: entry i is bit i % 8, from the lowest on, of byte i // 8
    deltas  of each task, partial sums of |D_t| over SUM_BLOCK entries each
    used    of each task, partial sums of |E M_t|
    """

    bits: Tensor
    deltas: tuple[list[float], ...]
    used: tuple[list[float], ...]


def task_masks(group: TaskGroup) -> Iterator[TaskMasks]:
    """The tasks' masks of the group's entries, BLOCK entries at a time."""
    import torch

    for block in blocks(group):
        sign = signs(block)
        size = sizes(block, sign)
        bits, deltas, used = [], [], []
        for t in range(len(block.tuned)):
            delta = block.delta(t).mul_(sign)
            mask = delta > 0
            bits.append(packed(mask))
            deltas.append(partial_sums(delta.abs_()))
            used.append(partial_sums(size * mask))
        yield TaskMasks(bits=torch.stack(bits), deltas=tuple(deltas), used=tuple(used))


def partial_sums(x: Tensor) -> list[float]:
    return [float(part.double().sum()) for part in x.split(SUM_BLOCK)]


def packed(mask: Tensor) -> Tensor:
    """Eight booleans a byte."""
    import torch

    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -len(mask) % 8)).reshape(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(1, dtype=torch.uint8)
