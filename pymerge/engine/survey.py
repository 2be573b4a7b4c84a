"""Answers to a rule's questions: from a tensor held in memory, or from tiles of a tensor or a model that is not.

Everything is exact and independent of the tiling: order statistics come from integer counts, sums from fixed blocks of
2^20 entries added with one rounding (math.fsum).
"""

from __future__ import annotations

import math
import struct
import threading
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import add
from typing import Protocol, TypeVar

from pymerge import _C
from pymerge.ops.delta_rule import KEEP_ALL_TIES, Cut, DeltaRule
from pymerge.ops.native import delta_params

SUM_BLOCK = 1 << 20  # entries per partial sum in the native layer
HIGH_BINS, LOW_BINS = 1 << 16, 1 << 15  # the 31 magnitude bits of a float32, in two digits
R = TypeVar("R")
Buffer = tuple[int, str]  # address, dtype


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Consecutive entries of one parameter in memory: base (or None) and tuned as (address, dtype)."""

    base: Buffer | None
    tuned: list[Buffer]
    count: int
    index0: int  # of the first entry, within the tensor
    number: int  # of the tile, within the sweep
    rule: DeltaRule  # of the tensor: gives the keys of its random mask


def doubles(data: bytes) -> array[float]:
    values = array("d")
    values.frombytes(data)
    return values


def add_parts(parts: Sequence[bytes], width: int) -> list[float]:
    """Sums over all blocks of all parts, each part holding rows of `width` partial sums."""
    values = [doubles(part) for part in parts]
    return [math.fsum(x for v in values for x in v[i::width]) for i in range(width)]


def add_gram(parts: Sequence[bytes], tasks: int) -> list[list[float]]:
    """The Gram matrix from the partial sums of all blocks."""
    flat = add_parts(parts, tasks * tasks)
    return [flat[row * tasks : (row + 1) * tasks] for row in range(tasks)]


def add_l1(parts: Sequence[bytes], tasks: int) -> list[tuple[float, float]]:
    """(norm, norm of what is selected) of each task from the partial sums of all blocks."""
    flat = add_parts(parts, 2 * tasks)
    return [(flat[2 * t], flat[2 * t + 1]) for t in range(tasks)]


def with_ties(index: bytes) -> bytes:
    """Cut indices that let every entry pass that equals the threshold; 0 (nothing passes) stays."""
    return array("q", (KEEP_ALL_TIES if cut > 0 else 0 for cut in array("q", index))).tobytes()


class HeldSurvey:
    """Questions about a tensor that is in memory."""

    def __init__(self, tile: Tile) -> None:
        self.tile = tile

    def kth(self, ranks: tuple[int, ...], rule: DeltaRule, keep_ties: bool) -> Cut:
        tile = self.tile
        keep, keys = (rule.keep, rule.keys) if rule.mask_first else (None, None)
        theta, index = _C.delta_kth(tile.base, tile.tuned, tile.count, ranks, rule.row_length or 0, keep, keys)
        if keep_ties:
            index = with_ties(index)
        return Cut(theta=theta, index=index)

    def l1(self, rule: DeltaRule) -> list[tuple[float, float]]:
        tile = self.tile
        part = _C.delta_l1(tile.base, tile.tuned, tile.count, tile.index0, delta_params(rule))
        return add_l1([part], len(tile.tuned))

    def gram(self) -> list[list[float]]:
        tile = self.tile
        return add_gram([_C.delta_gram(tile.base, tile.tuned, tile.count)], len(tile.tuned))

    def signs(self, rule: DeltaRule) -> int:
        tile = self.tile
        return _C.delta_signs(tile.base, tile.tuned, tile.count, tile.index0, delta_params(rule))


class Sweep(Protocol):
    """Runs a function over all tiles, or those numbered in `only`, and returns the results in order."""

    def __call__(self, function: Callable[[Tile], R], only: Collection[int] | None = None) -> list[R]: ...


class SweptSurvey:
    """Questions about entries that do not fit in memory: each question is one or more sweeps over the tiles."""

    def __init__(self, sweep: Sweep, tasks: int) -> None:
        self.sweep, self.tasks = sweep, tasks

    def kth(self, ranks: tuple[int, ...], rule: DeltaRule, keep_ties: bool) -> Cut:
        """Radix selection: two digits of the magnitude, then, where ties must be split, the index."""
        if rule.row_length:
            return self.kth_of_rows(ranks, rule, keep_ties)
        high = self.histogram(rule, None)
        digits = [descend(high[t * HIGH_BINS : (t + 1) * HIGH_BINS], ranks[t]) for t in range(self.tasks)]
        low = self.histogram(rule, [digit for digit, _ in digits])
        theta, index, split = array("f"), array("q"), {}
        for t, (digit, rest) in enumerate(digits):
            row = low[t * LOW_BINS : (t + 1) * LOW_BINS]
            last, need = descend(row, rest)
            theta.append(from_bits(digit << 15 | last) if ranks[t] > 0 else math.inf)
            index.append(KEEP_ALL_TIES if ranks[t] > 0 else 0)
            if not keep_ties and 0 < need < row[last]:
                split[t] = need
        for t, cut in self.split_ties(theta, split, rule).items():
            index[t] = cut
        return Cut(theta=theta.tobytes(), index=index.tobytes())

    def kth_of_rows(self, ranks: tuple[int, ...], rule: DeltaRule, keep_ties: bool) -> Cut:
        """Tiles are whole rows, and every row has a cut of its own."""

        def of_tile(tile: Tile) -> tuple[bytes, bytes]:
            row_length, index0 = rule.row_length or 0, tile.index0
            return _C.delta_kth(tile.base, tile.tuned, tile.count, ranks, row_length, *mask(tile, rule), index0)

        def joined(parts: list[bytes]) -> bytes:  # [T, rows of the tile] each -> [T, R]
            sizes = [len(part) // self.tasks for part in parts]
            return b"".join(
                p[t * n : (t + 1) * n] for t in range(self.tasks) for p, n in zip(parts, sizes, strict=True)
            )

        cuts = self.sweep(of_tile)
        index = joined([cut[1] for cut in cuts])
        return Cut(theta=joined([cut[0] for cut in cuts]), index=with_ties(index) if keep_ties else index)

    def histogram(self, rule: DeltaRule, prefix: list[int] | None) -> array[int]:
        """Counts of a magnitude digit over all tiles, [T, bins]."""
        bins = HIGH_BINS if prefix is None else LOW_BINS
        counts: dict[int, array[int]] = {}  # one a thread, so that the kernel may add without a lock

        def count(tile: Tile) -> None:
            mine = counts.setdefault(threading.get_ident(), array("q", bytes(8 * bins * self.tasks)))
            _C.delta_histogram(tile.base, tile.tuned, tile.count, tile.index0, *mask(tile, rule), prefix, mine)

        self.sweep(count)
        first, *others = counts.values()
        for other in others:
            first = array("q", map(add, first, other))
        return first

    def split_ties(self, theta: array[float], split: dict[int, int], rule: DeltaRule) -> dict[int, int]:
        """For each task in `split`: the index behind the last of the `split[t]` ties that belong to the first k."""
        if not split:
            return {}
        counts = self.count_ties(theta, rule)
        wanted: dict[int, list[tuple[int, int]]] = {}  # tile number -> (task, position among the ties of that tile)
        for t, need in split.items():
            number, left = 0, need - 1
            while left >= counts[number][t]:
                left -= counts[number][t]
                number += 1
            wanted.setdefault(number, []).append((t, left))
        return dict(self.find_ties(theta, wanted, rule))

    def count_ties(self, theta: array[float], rule: DeltaRule) -> list[Sequence[int]]:
        """Entries of each task that equal its threshold, tile by tile."""
        return self.sweep(
            lambda tile: _C.delta_count_equal(
                tile.base, tile.tuned, tile.count, tile.index0, *mask(tile, rule), list(theta)
            )
        )

    def find_ties(
        self, theta: array[float], wanted: Mapping[int, Sequence[tuple[int, int]]], rule: DeltaRule
    ) -> list[tuple[int, int]]:
        """(task, index behind it) of the ties wanted: tile number -> (task, position among the tile's ties)."""

        def find(tile: Tile) -> list[tuple[int, int]]:
            keep, keys = mask(tile, rule)
            found = []
            for t, nth in wanted[tile.number]:
                keep_t, key_t = (None, None) if keep is None or keys is None else (keep[t], keys[t])
                where = _C.delta_find_equal(
                    tile.base, tile.tuned[t], tile.count, tile.index0, keep_t, key_t, theta[t], nth
                )
                found.append((t, where + 1))
            return found

        return [tie for found in self.sweep(find, only=wanted) for tie in found]

    def l1(self, rule: DeltaRule) -> list[tuple[float, float]]:
        return add_l1(self.l1_parts(rule), self.tasks)

    def l1_parts(self, rule: DeltaRule) -> list[bytes]:
        params = delta_params(rule)
        return self.sweep(lambda tile: _C.delta_l1(tile.base, tile.tuned, tile.count, tile.index0, params))

    def gram(self) -> list[list[float]]:
        return add_gram(self.gram_parts(), self.tasks)

    def gram_parts(self) -> list[bytes]:
        return self.sweep(lambda tile: _C.delta_gram(tile.base, tile.tuned, tile.count))

    def signs(self, rule: DeltaRule) -> int:
        def count(tile: Tile) -> int:
            params = delta_params(replace(rule, keep=tile.rule.keep, keys=tile.rule.keys))
            return _C.delta_signs(tile.base, tile.tuned, tile.count, tile.index0, params)

        return sum(self.sweep(count))


Mask = tuple[tuple[float, ...] | None, tuple[int, ...] | None]


def mask(tile: Tile, rule: DeltaRule) -> Mask:
    """Keep probabilities and keys of the random mask, where magnitudes are ranked behind it."""
    return (tile.rule.keep, tile.rule.keys) if rule.mask_first else (None, None)


def descend(counts: array[int], rank: int) -> tuple[int, int]:
    """(bin, rank within it) of the rank-th largest (1-based) entry; beyond the last entry: bin 0."""
    left = rank
    for i in range(len(counts) - 1, -1, -1):
        if counts[i] >= left:
            return i, left
        left -= counts[i]
    return 0, 0


def from_bits(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]
