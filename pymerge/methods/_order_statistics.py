"""Order statistics of T values an entry over all blocks of a survey, exact: two digits of 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pymerge.methods.base import Combine, TaskGroup, TensorInfo
from pymerge.methods.blocks import BLOCK, blocks
from pymerge.methods.surveyed import SurveyedCombine

BITS = 16
BINS = 1 << BITS

Found = tuple[tuple[float, ...], ...]  # [task][rank]


@dataclass(frozen=True, kw_only=True)
class OrderStatistics(SurveyedCombine):
    """Finds, for each task, the values at given places of the ascending order of `values`.

    values   block -> float32 of the block's shape, task by task; the same bits wherever the blocks' borders are
    places   number of entries -> the places, from 0
    then     what goes on with the values found
    leading  the first digit of each value, and its place among the entries with that digit; None: to be found
    """

    values: Callable[[TaskGroup], Iterable[Tensor]]
    places: Callable[[int], tuple[int, ...]]
    then: Callable[[Found], Combine]
    leading: tuple[tuple[tuple[int, int], ...], ...] | None = None

    def survey(self, group: TaskGroup) -> Tensor:
        """Counts of a digit, int64 [T, 1, BINS], or [T, places, BINS] of the second digit."""
        counts: Tensor | None = None
        for block in blocks(group):
            found = self._counts(block)
            counts = found if counts is None else counts.add_(found)
        assert counts is not None  # blocks have entries
        return counts

    def _counts(self, group: TaskGroup) -> Tensor:
        counts = []
        for t, values in enumerate(self.values(group)):
            keys = sortable(values.reshape(-1))
            high = (keys >> BITS) + BINS // 2
            if self.leading is None:
                counts.append(torch.bincount(high, minlength=BINS)[None])
                continue
            low = keys & (BINS - 1)
            rows = {digit: torch.bincount(low[high == digit], minlength=BINS) for digit, _ in self.leading[t]}
            counts.append(torch.stack([rows[digit] for digit, _ in self.leading[t]]))
        return torch.stack(counts)

    def join(self, one: Tensor, other: Tensor) -> Tensor:
        return one.add_(other)

    def decide(self, answer: Tensor) -> Combine:
        if self.leading is None:
            places = self.places(int(answer[0].sum()))
            return replace(self, leading=tuple(tuple(descend(row[0], place) for place in places) for row in answer))
        found = tuple(
            tuple(from_digits(digit, descend(row, rest)[0]) for (digit, rest), row in zip(leading, rows, strict=True))
            for leading, rows in zip(self.leading, answer, strict=True)
        )
        return self.then(found)

    def workspace(self, info: TensorInfo) -> int:
        return 48 * min(BLOCK, info.numel) + 40 * BINS * info.tasks


def sortable(x: Tensor) -> Tensor:
    """int32 keys in the order of float32 values."""
    bits = (x + 0.0).view(torch.int32)  # -0 becomes 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def from_digits(high: int, low: int) -> float:
    key = torch.tensor(((high - BINS // 2) << BITS) | low, dtype=torch.int32)
    return float((key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32))


def descend(counts: Tensor, place: int) -> tuple[int, int]:
    """(bin, place within it) of the entry at a place of the ascending order."""
    ends = counts.cumsum(0)
    found = int(torch.searchsorted(ends, place, right=True))
    return found, place - (int(ends[found - 1]) if found else 0)
