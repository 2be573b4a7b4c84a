"""What the spectral combine steps share: the sum of the task vectors, singular triplets above the rounding errors of
stored weights, polar factors of stacked singular vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pymerge.linalg import Polar, polar, truncated_svd
from pymerge.methods.base import TaskGroup
from pymerge.ops.delta import merge_by_rule
from pymerge.ops.delta_rule import DeltaRule

# Rounding a weight leaves an rms error of 0.2125 eps times its size (measured: 0.212 to 0.213 for normal, Laplace and
# uniform weights). Independent errors have no singular value above the largest row norm plus the largest column norm,
# up to a few percent (Bandeira and van Handel, arXiv 1408.6185); half as much again is put on top.
ROUNDING = 1.5 * 0.2125
SHARE = 0.1  # of a task vector's own row and column norms that rounding may account for at most
RESOLUTION = 1e-6  # of the largest singular value: what float32 task vectors resolve
ANGLE = 0.01  # largest error of singular directions that the rank of a stack takes account of


class Triplets(NamedTuple):
    """left [m, q], s [q] descending, right [n, q]; `angle`: where rounding errors were cut off,
    the sine of what they may have turned the directions by."""

    left: Tensor
    s: Tensor
    right: Tensor
    angle: float


def spread(a: Tensor) -> float:
    """Largest row norm plus largest column norm; the spectral norm is at least half of it."""
    rows, columns = 0.0, torch.zeros(a.shape[1], device=a.device)
    for part in a.split(128):
        squares = part.float().square()
        rows = max(rows, float(squares.sum(1).max())) if squares.numel() else rows
        columns += squares.sum(0)
    return rows**0.5 + (float(columns.max()) ** 0.5 if columns.numel() else 0.0)


def stored_errors(group: TaskGroup) -> list[float]:
    """For each task, what the singular values of its weights' rounding errors are below."""
    if group.base is None:
        return [ROUNDING * torch.finfo(t.dtype).eps * spread(t) for t in group.tuned]
    size, base = spread(group.base), torch.finfo(group.base.dtype).eps
    return [ROUNDING * size * max(base, torch.finfo(t.dtype).eps) for t in group.tuned]


def noise_level(size: float, errors: float) -> float:
    """Singular values up to this are rounding errors, in a task vector whose spread is `size` and whose stored form has
    such up to `errors`. One that is hardly larger than they are keeps all but its smallest values: the errors are no
    longer independent of it."""
    return max(RESOLUTION * size, min(errors, SHARE * size))


def sum_of_deltas(base: Tensor | None, tuned: Sequence[Tensor], divisor: float = 1.0) -> Tensor:
    """sum_t D_t / divisor, float32, in one pass."""
    return merge_by_rule(DeltaRule(weights=(1.0,) * len(tuned), divisor=divisor), base, tuned)


def sum_and_sizes(group: TaskGroup) -> tuple[Tensor, list[float]]:
    """sum_t D_t, float32, and the spread of each D_t."""
    total, sizes = torch.zeros(group.tuned[0].shape, device=group.tuned[0].device), []
    for t in range(len(group.tuned)):
        delta = group.delta(t)
        sizes.append(spread(delta))
        total += delta
    return total, sizes


def sum64(s: Tensor) -> float:
    return float(s.double().sum())


def norm_below(a: Tensor, steps: int = 4) -> float:
    """A lower bound of the spectral norm, by power iteration from the longest row."""
    x = a[int(torch.linalg.vector_norm(a, dim=1).argmax())]
    size = float(x.norm())
    for _ in range(steps if size else 0):
        y = a @ (x / size)
        x = a.mT @ (y / y.norm())
        size = float(x.norm())
    return size


def rank_tolerance(a: Tensor, errors: float, terms: float = 0.0) -> float:
    """`tol` of `polar` for a matrix whose stored form has singular values of rounding errors up to `errors`, and which
    is a float32 sum of terms whose spreads sum to `terms`; 1 and more: all of it is rounding."""
    size = norm_below(a) if a.numel() else 0.0
    if size == 0.0:
        return RESOLUTION
    level = max(noise_level(spread(a), errors), ROUNDING * torch.finfo(torch.float32).eps * terms)
    return max(RESOLUTION, level / size)


def top_triplets(a: Tensor, count: int, noise: float | None) -> Triplets:
    """The `count` largest singular triplets of a [m, n], less those up to `noise` (None: all)."""
    found = truncated_svd(a, count)
    if noise is None:
        return Triplets(found.U, found.S, found.Vh.mT, 0.0)
    kept = int((found.S > noise).sum())
    angle = noise / float(found.S[kept - 1]) if 0 < kept < count else 0.0
    return Triplets(found.U[:, :kept], found.S[:kept], found.Vh[:kept].mT, angle)


def stack_tolerance(parts: Sequence[Triplets], keep_all: bool) -> float:
    """`tol` for stacks of singular directions: with tasks of low rank, what rounding makes of directions they share."""
    return 0.0 if keep_all else max(RESOLUTION, min(ANGLE, max((p.angle for p in parts), default=0.0)))


def polar_of_stack(blocks: Sequence[Tensor], tol: float) -> Polar:
    return polar(torch.cat(list(blocks), dim=1), tol)


def note_ranks(group: TaskGroup, parts: Sequence[Triplets]) -> None:
    """Ranks kept, the smallest kept singular value over the task's largest, tasks that contribute nothing."""
    ratios = [float(p.s[-1] / p.s[0]) for p in parts if len(p.s) and float(p.s[0]) > 0]
    group.notes.facts["ranks"] = [len(p.s) for p in parts]
    group.notes.facts["smallest_ratio"] = min(ratios, default=0.0)
    skipped = [t for t, p in enumerate(parts) if not len(p.s)]
    if skipped:
        group.notes.facts["skipped_tasks"] = skipped


def directions_of_sum(base: Tensor | None, tuned: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Top `rank` singular directions of sum_t D_t: U [m, rank], V [n, rank]."""
    total = sum_of_deltas(base, tuned)
    if rank == 0:
        return total.new_empty(total.shape[0], 0), total.new_empty(total.shape[1], 0)
    found = truncated_svd(total, rank)
    return found.U, found.Vh.mT
