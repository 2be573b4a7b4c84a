"""Leading singular values of updates, how many of their directions are proven, and how far those are shared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from pymerge.checkpoint import ITEMSIZE, TORCH_NAME, AnyTensor, safe_name
from pymerge.engine.moments import Compared
from pymerge.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.engine.execute import Progress

FLOAT32 = 2.0**-21  # of the squared norm: what float32 singular values cannot tell from nothing
HELD = 0.95  # share of an update's squared norm that a rank is asked to hold


@dataclass(frozen=True)
class MatrixOf:
    """A matrix within a tensor: all of it, or that of one expert."""

    name: str
    compared: Compared
    shape: tuple[int, int]
    first: int = 0  # entry of the tensor with which it begins

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Read for it."""
        return sum(self.count * ITEMSIZE[tensor.dtype] for tensor in self.compared.inputs)

    def workspace(self, rank: int) -> int:
        """Memory while it is decomposed: base, update and stored bytes, bases of all models, a float64 Gram matrix."""
        side, bases = min(self.shape), len(self.compared.tuned) * rank * sum(self.shape)
        return 16 * self.count + 4 * bases + 24 * side * side


@dataclass(frozen=True)
class Overlap:
    """Between the leading `rank` directions of two models, both spaces proven (each to a sine of 0.1).

    left, right  cosines of the principal angles of output and input directions, descending; empty at rank 0"""

    rank: int
    left: tuple[float, ...]
    right: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """Mean squared cosine of both sides: 0 orthogonal, 1 the same space. None: nothing is proven."""
        return float(np.mean(np.square(self.left + self.right))) if self.rank else None


@dataclass(frozen=True)
class Spectrum:
    """Of the updates of one matrix by T models.

    values     [T][k] leading singular values, descending
    energy     [T] squared norm of the update: the exact sum of all squared singular values
    certified  [T] leading directions whose angle to the true ones is proven to have a sine <= 0.1
    overlaps   (s, t) -> Overlap, s < t"""

    name: str
    shape: tuple[int, int]
    values: tuple[tuple[float, ...], ...]
    energy: tuple[float, ...]
    certified: tuple[int, ...]
    overlaps: dict[tuple[int, int], Overlap]

    def squares(self, task: int) -> np.ndarray:
        """Squared singular values, min(m, n) of them: the leading ones as found, the others by `tail_estimate`."""
        top = np.square(self.values[task])
        return np.concatenate([top, tail_estimate(top, self.energy[task], min(self.shape) - len(top))])

    @cached_property
    def effective_ranks(self) -> tuple[float | None, ...]:
        """exp of the entropy of the singular values over their sum (Roy and Vetterli 2007), with the tail estimated;
        None for a zero update."""
        return tuple(exp_entropy(np.sqrt(self.squares(task))) for task in range(len(self.values)))

    def stable_rank(self, task: int) -> float | None:
        """||D||_F^2 / s_1^2: nothing of it is estimated."""
        return self.energy[task] / self.values[task][0] ** 2 if self.energy[task] else None

    def rank_holding(self, task: int, share: float) -> int:
        """Least rank that holds this share of the squared norm; exact up to the values found, estimated behind them."""
        squares = self.squares(task)
        if not squares.any():
            return 0
        held = np.cumsum(squares) >= share * squares.sum() * (1 - 1e-12)
        return int(np.argmax(held)) + 1

    @cached_property
    def ranks_held(self) -> tuple[int, ...]:
        """`rank_holding` 95 %"""
        return tuple(self.rank_holding(task, HELD) for task in range(len(self.values)))


def exp_entropy(values: np.ndarray) -> float | None:
    if not values.any():
        return None
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def tail_estimate(top: np.ndarray, energy: float, count: int) -> np.ndarray:
    """`count` squared values behind those found: falling geometrically from the last one, with the sum that the squared
    norm leaves for them, which is exact; all equal where the sum asks for that."""
    left = energy - float(top.sum())
    if count == 0 or left <= FLOAT32 * energy or top[-1] <= 0:
        return np.zeros(count)
    last = float(top[-1])
    if left >= count * last:
        return np.full(count, left / count)
    low, high = 0.0, 1.0
    for _ in range(60):
        ratio = (low + high) / 2
        total = last * ratio * (1 - ratio**count) / (1 - ratio) if ratio < 1 else last * count
        low, high = (ratio, high) if total < left else (low, ratio)
    squares = last * high ** np.arange(1, count + 1)
    return squares * (left / squares.sum())


def decompose(
    matrices: Sequence[MatrixOf], rank: int, *, threads: int, memory: int, progress: Progress
) -> list[Spectrum]:
    """The spectrum of each matrix, in order, side by side as far as the memory (bytes) allows.

    Cost    truncated_svd of each model's update at `rank`; each matrix is read once
    Raises  RecipeError: a matrix that does not fit the memory"""
    largest = max(matrices, key=lambda matrix: matrix.workspace(rank), default=None)
    if largest is None:
        return []
    need = largest.workspace(rank)
    if need > memory:
        raise RecipeError(
            f"the spectrum of {safe_name(largest.name)} needs {need / 1e6:.0f} MB, the memory budget leaves "
            f"{memory / 1e6:.0f} MB: raise --memory (memory= in Python) by {(need - memory) / 1e6:.0f} MB, or take "
            "--no-spectra (spectra=False)"
        )
    from pymerge.engine.generic import threads_of_numerics, use_threads  # imports torch

    at_once = max(1, min(threads, memory // need))
    own = max(1, threads // at_once)

    def work(matrix: MatrixOf) -> Spectrum:
        use_threads(own)
        return spectrum_of(matrix, rank)

    with threads_of_numerics(own), ThreadPoolExecutor(at_once) as pool:
        try:
            done = []
            for matrix, found in zip(matrices, pool.map(work, matrices), strict=True):
                progress.advance(matrix.bytes, matrix.compared.base.name)
                done.append(found)
            return done
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def spectrum_of(matrix: MatrixOf, rank: int) -> Spectrum:
    """Of all models' updates of one matrix."""
    from pymerge.linalg import truncated_svd

    rank = min(rank, *matrix.shape)
    base = loaded(matrix, matrix.compared.base)
    values, energies, certified, left, right = [], [], [], [], []
    for tensor in matrix.compared.tuned:
        update = loaded(matrix, tensor).sub_(base)
        u, s, vh, info = truncated_svd(update, rank)
        energy = squared_norm(update)
        values.append(tuple(s.tolist()))
        energies.append(energy)
        certified.append(int(info.certified_rank) if energy else 0)
        left.append(u)
        right.append(vh.mT)
    overlaps = {}
    for s, t in combinations(range(len(values)), 2):
        j = min(certified[s], certified[t])
        overlaps[s, t] = Overlap(j, *(cosines(side[s][:, :j], side[t][:, :j]) for side in (left, right)))
    return Spectrum(matrix.name, matrix.shape, tuple(values), tuple(energies), tuple(certified), overlaps)


def loaded(matrix: MatrixOf, tensor: AnyTensor) -> Tensor:
    """The matrix of one model, float32, in memory of its own."""
    import torch

    width = ITEMSIZE[tensor.dtype]
    raw = torch.empty(matrix.count * width, dtype=torch.uint8)
    tensor.read_into(raw.numpy().data, matrix.first * width)
    return raw.view(getattr(torch, TORCH_NAME[tensor.dtype])).float().reshape(matrix.shape)


def squared_norm(update: Tensor) -> float:
    """In float64, some rows at a time."""
    rows = max(1, (1 << 16) // update.shape[1])
    return float(sum(float(block.double().square().sum()) for block in update.split(rows)))


def cosines(a: Tensor, b: Tensor) -> tuple[float, ...]:
    """Of the principal angles between the spaces of two orthonormal bases (Bjorck and Golub 1973), descending."""
    import torch

    if a.shape[1] == 0:
        return ()
    found: Any = torch.linalg.svdvals(a.mT.double() @ b.double()).clamp(max=1.0)
    return tuple(found.tolist())
