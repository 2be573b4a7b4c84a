"""The weights of PCB-Merging: two surveys of order statistics, then one pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pymerge.methods._order_statistics import Found, OrderStatistics
from pymerge.methods.base import Combine, TaskGroup, TensorInfo
from pymerge.methods.blocks import BLOCK, in_blocks

CLIPPED = 1e-4  # share of the entries that are clipped at either end


def first_question(ratio: float, scale: float) -> OrderStatistics:
    """The borders of each task's magnitudes; then those of its scores; then the merge."""
    then = partial(ask_scores, ratio=ratio, scale=scale)
    return OrderStatistics(values=magnitudes_of, places=borders_of_magnitudes, then=then)


def borders_of_magnitudes(entries: int) -> tuple[int, ...]:
    return int(entries * CLIPPED), int(entries * (1 - CLIPPED) - 1)


def borders_of_scores(entries: int, ratio: float) -> tuple[int, ...]:
    return min(int(entries * (1 - ratio)), entries - 1), entries - 1


def ask_scores(magnitudes: Found, ratio: float, scale: float) -> Combine:
    return OrderStatistics(
        values=partial(scores_of, magnitudes=magnitudes),
        places=partial(borders_of_scores, ratio=ratio),
        then=partial(merge_with, magnitudes=magnitudes, scale=scale),
    )


def merge_with(scores: Found, magnitudes: Found, scale: float) -> Combine:
    return PcbMerge(magnitudes=magnitudes, scores=scores, scale=scale)


def magnitudes_of(group: TaskGroup) -> Iterator[Tensor]:
    for t in range(len(group.tuned)):
        yield group.delta(t).abs_()


def scores_of(group: TaskGroup, magnitudes: Found) -> Iterator[Tensor]:
    total = total_of(group)
    for t in range(len(group.tuned)):
        yield scores(group.delta(t), total, len(group.tuned), *magnitudes[t])


def total_of(group: TaskGroup) -> Tensor:
    total = group.delta(0)
    for t in range(1, len(group.tuned)):
        total += group.delta(t)
    return total


def scores(delta: Tensor, total: Tensor, tasks: int, low: float, high: float) -> Tensor:
    """within * between, up to the factor exp(-T), which the mapping to [0, 1] removes: no overflow for any T."""
    between = torch.tanh_(total * delta)
    within = scaled(delta.abs().clamp_(low, high), low, high)
    return within.square_().sub_(1).mul_(tasks).exp_().mul_(between)


def scaled(x: Tensor, low: float, high: float) -> Tensor:
    """Values of [low, high] mapped to [0, 1]; where these are one value: 1 if it is positive, else 0. Overwrites x."""
    if low < high:
        return x.sub_(low).div_(high - low)
    return x.fill_(float(high > 0))


@dataclass(frozen=True, kw_only=True)
class PcbMerge(Combine):
    """The last pass: all borders are known. [task] -> (low, high)."""

    magnitudes: Found
    scores: Found
    scale: float

    name = "pcb"
    unit = "entries"

    def combine(self, group: TaskGroup) -> Tensor:
        return in_blocks(group, self._combine)

    def _combine(self, group: TaskGroup) -> Tensor:
        total = total_of(group)
        merged, weights = torch.zeros_like(total), torch.zeros_like(total)
        for t, ((low, high), (least, most)) in enumerate(zip(self.magnitudes, self.scores, strict=True)):
            delta = group.delta(t)
            score = scores(delta, total, len(group.tuned), low, high)
            losers = score < least
            weight = scaled(score.clamp_(least, most), least, most).masked_fill_(losers, 0)
            clipped = delta.abs().clamp_(low, high).mul_(delta.sign())
            merged += clipped.mul_(weight)
            weights += weight
        return merged.div_(weights.clamp_(min=1e-12)).mul_(self.scale)

    def workspace(self, info: TensorInfo) -> int:
        return 40 * min(BLOCK, info.numel)
