"""The best permutation of one group for given similarities: assignment, in two levels where units come in blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pymerge.align.groups import Group, Units, View
from pymerge.linalg import assign

ALTERNATIONS = 2  # of query order and channel order under grouped queries (specification of MuDSC, 9.2)


@dataclass(frozen=True)
class UnitSet:
    """Units with a similarity of their own: those of a Units group; channels of q and k, or of v and o, of Heads.

    base    the view that has one entry a unit
    shared  the view that has r entries a unit, one for each query head of a key-value head; r may be 1
    fixed   the first channels of each block that stay
    """

    base: View
    shared: View | None = None
    fixed: int = 0

    @property
    def views(self) -> tuple[View, ...]:
        return (self.base,) if self.shared is None else (self.base, self.shared)


@dataclass(frozen=True)
class Blocks:
    """A group as the solver sees it: `count` blocks of `width` units, each with `queries` query heads."""

    count: int
    queries: int
    width: int
    sets: tuple[UnitSet, ...]


def blocks_of(group: Group) -> Blocks:
    if isinstance(group, Units):
        return Blocks(group.blocks, 1, group.size // group.blocks, (UnitSet("units"),))
    sets = (UnitSet("k", "q", group.rotary), UnitSet("v", "o"))
    return Blocks(group.kv_heads, group.heads // group.kv_heads, group.width, sets)


@dataclass(frozen=True, kw_only=True)
class Match:
    """Where the units of one model go.

    index   view -> int64 [n]: the model's unit for each of the anchor's
    values  of each set of units: mean similarity of matched units
    gain    mean of `values` less that of the identity
    gap     bound on how much the mean of `values` falls short of the best; None: not known (grouped queries)
    """

    index: Mapping[View, Tensor]
    values: tuple[float, ...]
    gain: float
    gap: float | None
    key: bytes = b""

    def __post_init__(self) -> None:
        digest = hashlib.blake2b(b"".join(v.numpy().tobytes() for v in self.index.values()), digest_size=16)
        object.__setattr__(self, "key", digest.digest())


def unmoved(group: Group) -> Match:
    """The identity, of unknown similarity."""
    index: dict[View, Tensor] = {view: torch.arange(n) for view, n in group.views().items()}
    return Match(index=index, values=(), gain=0.0, gap=None)


def match(group: Group, scores: Mapping[View, Tensor], threshold: float) -> Match:
    """The permutation with the largest mean similarity that the group allows; the identity if it gains < threshold.

    scores   base view -> float32 [n, n], anchor's units in rows; shared view -> [r n, r n], what a query head adds to
             its channels' similarity, only where r > 1. A set without scores keeps its channels' order.
    Cost     b^2 assignments of n / b units and one of b; b blocks"""
    blocks = blocks_of(group)
    inner = Inner(blocks, scores)
    outer = assign(inner.total.float(), True)
    rows, sigma = torch.arange(blocks.count), outer.columns
    values = tuple(float(value[rows, sigma].mean()) for value in inner.values)
    diagonal = [identity_value(blocks, unit_set, scores) for unit_set in blocks.sets]
    gain = (sum(values) - sum(diagonal)) / len(values)
    gap = None  # grouped queries are solved by turns, which may end in a local optimum
    if blocks.queries == 1:
        gap = (float(outer.gap) + float(inner.gap.amax(1).sum())) / blocks.count / len(values)
    if gain < threshold:
        missed = None if gap is None else max(0.0, gain + gap)
        return Match(index=unmoved(group).index, values=tuple(diagonal), gain=0.0, gap=missed)
    return Match(index=composed(blocks, inner, sigma), values=values, gain=gain, gap=gap)


def composed(blocks: Blocks, inner: Inner, sigma: Tensor) -> dict[View, Tensor]:
    rows = torch.arange(blocks.count)
    tau = inner.tau[rows, sigma]  # [K, r]
    index: dict[View, Tensor] = {}
    for unit_set, channels in zip(blocks.sets, inner.channels, strict=True):
        within = channels[rows, sigma]  # [K, d]
        index[unit_set.base] = (sigma[:, None] * blocks.width + within).flatten()
        if unit_set.shared is not None:
            head = sigma[:, None] * blocks.queries + tau  # [K, r]
            index[unit_set.shared] = (head[:, :, None] * blocks.width + within[:, None]).flatten()
    return index


def identity_value(blocks: Blocks, unit_set: UnitSet, scores: Mapping[View, Tensor]) -> float:
    sums = [scores[view].diagonal().sum(dtype=torch.float64) for view in unit_set.views if view in scores]
    return float(sum(sums)) / (blocks.count * blocks.width)


class Inner:
    """For every pair of blocks the best order of channels and of query heads.

    channels  of each set, int64 [K, K, d]; tau int64 [K, K, r]
    values    of each set, mean similarity [K, K]; total their sum; gap [K, K] of total
    """

    def __init__(self, blocks: Blocks, scores: Mapping[View, Tensor]) -> None:
        k, r, d = blocks.count, blocks.queries, blocks.width
        self.blocks = blocks
        self.base = [pairs(scores.get(s.base), k, 1, d) for s in blocks.sets]  # [K, K, 1, 1, d, d]
        self.shared = [pairs(scores.get(s.shared) if s.shared else None, k, r, d) for s in blocks.sets]
        self.tau = torch.arange(r).expand(k, k, r)
        self.solve_channels(with_queries=r == 1)
        for _ in range(ALTERNATIONS if r > 1 else 0):
            self.solve_queries()
            self.solve_channels(with_queries=True)
        self.total = torch.stack(self.values).sum(0)

    def solve_channels(self, with_queries: bool) -> None:
        self.channels: list[Tensor] = []
        self.values: list[Tensor] = []
        self.gap = torch.zeros(self.blocks.count, self.blocks.count, dtype=torch.float64)
        for unit_set, base, shared in zip(self.blocks.sets, self.base, self.shared, strict=True):
            score = base[:, :, 0, 0] if base is not None else None  # [K, K, d, d]
            if shared is not None and with_queries:
                picked = shared.take_along_dim(self.tau[..., None, None, None], 3).sum((2, 3))
                score = picked if score is None else score + picked
            channels, value, gap = self.best_channels(score, unit_set.fixed)
            self.channels.append(channels)
            self.values.append(value / self.blocks.width)
            self.gap += gap / self.blocks.width

    def best_channels(self, score: Tensor | None, fixed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Order [K, K, d] of the channels of each pair, total score, gap [K, K]."""
        k, d = self.blocks.count, self.blocks.width
        channels = torch.arange(d).repeat(k, k, 1)
        zero = torch.zeros(k, k, dtype=torch.float64)
        if score is None:
            return channels, zero, zero
        value = score[..., :fixed, :fixed].diagonal(dim1=-2, dim2=-1).double().sum(-1)
        if fixed == d:
            return channels, value, zero
        found = assign(score[..., fixed:, fixed:].reshape(k * k, d - fixed, d - fixed), True)
        channels[..., fixed:] = found.columns.view(k, k, -1) + fixed
        return channels, value + found.primal.view(k, k), found.gap.view(k, k)

    def solve_queries(self) -> None:
        """The order of the query heads of each pair, given the order of channels."""
        k, r = self.blocks.count, self.blocks.queries
        score = torch.zeros(k, k, r, r)
        for channels, shared in zip(self.channels, self.shared, strict=True):
            if shared is not None:
                score += shared.take_along_dim(channels[:, :, None, None, :, None], -1).sum((-1, -2))
        self.tau = assign(score.reshape(k * k, r, r), True).columns.view(k, k, r)


def pairs(score: Tensor | None, k: int, r: int, d: int) -> Tensor | None:
    """[k r d, k r d] by pairs of blocks: [k, k, r, r, d, d]."""
    return None if score is None else score.view(k, r, d, k, r, d).permute(0, 3, 1, 4, 2, 5)
