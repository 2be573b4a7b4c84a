"""Merged updates as the tensors of a LoRA adapter: factors of matrices, all else whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymerge.checkpoint import ITEMSIZE, TORCH_NAME, AnyTensor
from pymerge.engine.check import Entry
from pymerge.engine.execute import Executor, Progress, Stop
from pymerge.engine.factored import factored_group, update_of
from pymerge.engine.generic import threads_of_numerics, use_threads
from pymerge.engine.piece import Piece
from pymerge.engine.pipeline import Segment
from pymerge.engine.plan import Plan
from pymerge.engine.spill import Spill, Spilled, bytes_of
from pymerge.linalg import truncated_svd
from pymerge.methods.base import Factors
from pymerge.methods.cores import orthonormal

ENTRIES = 1 << 22  # of tensors that are not needed whole, at a time
SLABS = 32 << 20  # bytes of a decomposition that do not grow with the matrix


@dataclass(frozen=True, kw_only=True)
class Low:
    """One matrix: left [m, r] and right [r, n] with equal shares of the singular values; what they leave of it.

    error   Frobenius norm of what is left out, over that of the update
    norm    Frobenius norm of the update
    """

    factors: Factors
    error: float
    norm: float


def low_of_matrix(update: Tensor, rank: int) -> Low:
    """The best approximation of that rank, by certified truncated SVD. update float32 [m, n], not zero."""
    found = truncated_svd(update, min(rank, *update.shape))
    root = found.S.sqrt()
    norm = float(torch.linalg.vector_norm(update, dtype=torch.float64))
    error = max(0.0, 1.0 - float(found.S.double().square().sum()) / norm**2) ** 0.5
    return Low(factors=Factors(found.U * root, root[:, None] * found.Vh), error=error, norm=norm)


def low_of_factors(update: Factors, rank: int | None) -> Low:
    """The same of a product, by the SVD of its core in float64; rank None: all of it."""
    left, (by_left,) = orthonormal([update.left])
    right, (by_right,) = orthonormal([update.right.mT])
    u, s, vh = torch.linalg.svd(by_left @ by_right.mT, full_matrices=False)
    norm = float(s.norm())
    useful = int((s > 1e-7 * s[:1]).sum()) if norm else 0  # float32 factors resolve no more
    kept = useful if rank is None else min(rank, useful)
    root = s[:kept].sqrt()
    factors = Factors((left @ (u[:, :kept] * root)).float(), (root[:, None] * vh[:kept] @ right.mT).float())
    return Low(factors=factors, error=float(s[kept:].norm()) / norm if norm else 0.0, norm=norm)


@dataclass(frozen=True, kw_only=True)
class KeptLow:
    """A `Low` on disk; left and right in the adapter's dtype."""

    left: Spilled
    right: Spilled
    error: float
    norm: float

    @property
    def rank(self) -> int:
        return self.right.shape[0]


class AdapterSink:
    """Collects what an adapter is made of, on disk; each update is dropped when its factors are known.

    rank   of matrices; None: that of the merged factors
    dtype  of the adapter's factors
    low    matrix -> its factors;  whole  other tensors that the merge changes -> their update, float32
    """

    done: Mapping[str, Sequence[tuple[int, int, int]]] = {}

    def __init__(
        self, entries: Mapping[str, Entry], matrices: set[str], rank: int | None, dtype: torch.dtype, spill: Spill
    ) -> None:
        self.entries = entries
        self.matrices, self.rank, self.dtype, self.spill = matrices, rank, dtype, spill
        self.open: dict[str, tuple[Spilled, int]] = {}  # tensors that are not complete: values, bytes that are missing
        self.low: dict[str, KeptLow] = {}
        self.whole: dict[str, Spilled] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    def forget(self, name: str) -> None:
        """Nothing was ever finished before."""

    def read_into(self, name: str, view: memoryview) -> None:
        raise ValueError(f"{name}: what is merged is not kept; steps that look at it are refused before")

    def write(self, name: str, start: int, view: memoryview, crc: int, facts: Mapping[str, Any]) -> None:
        """Float32 updates. By one thread."""
        if facts:
            self.facts.setdefault(name, {}).update(facts)
        shape, values = self.entries[name].shape, torch.frombuffer(view, dtype=torch.float32)
        matrix, size = name in self.matrices, math.prod(shape) * ITEMSIZE["F32"]
        if matrix and len(view) == size:
            return self.decompose(name, values.view(shape))
        if name not in self.open:
            self.open[name] = self.spill.room(shape, torch.float32, used=matrix), size
        kept, missing = self.open[name]
        self.open[name] = kept, missing - len(view)
        if matrix:
            kept.write(start, view)
        elif any_of(values):
            kept.write(start, view)
            self.whole[name] = kept
        if missing == len(view):
            del self.open[name]
            if matrix:
                self.decompose(name, kept.load())
                self.spill.give_back(kept)

    def decompose(self, name: str, update: Tensor) -> None:
        assert self.rank is not None
        if any_of(update.view(-1)):
            self.keep(name, low_of_matrix(update, self.rank))

    def take(self, name: str, update: Factors, facts: Mapping[str, Any]) -> None:
        """By any thread."""
        self.facts[name] = dict(facts)
        if name in self.matrices:
            self.keep(name, low_of_factors(update, self.rank))
        elif any_of((whole := update.left @ update.right).view(-1)):
            self.whole[name] = self.spill.put(whole)

    def keep(self, name: str, low: Low) -> None:
        if not low.norm:
            return
        left, right = (self.spill.put(factor.to(self.dtype)) for factor in low.factors)
        self.low[name] = KeptLow(left=left, right=right, error=low.error, norm=low.norm)


def any_of(flat: Tensor) -> bool:
    """Whether something is not zero; `any` of floating point makes a copy, as bytes."""
    return any(bool(part.any()) for part in flat.split(ENTRIES))


def decomposition_bytes(m: int, n: int, rank: int) -> int:
    """What it takes at most to decompose an update that came in tiles: itself, singular vectors in float32, Gram matrix
    and eigenvectors in float64."""
    return 4 * m * n + 16 * (m + n) * min(rank, m, n) + 24 * min(m, n) ** 2 + SLABS


class AdapterExecutor(Executor):
    """Hands over the updates of adapters as the factors that they are."""

    sink: AdapterSink  # type: ignore[assignment]

    def __init__(self, plan: Plan, sink: AdapterSink, *, threads: int, progress: Progress, stop: Stop) -> None:
        super().__init__(plan, sink, threads=threads, progress=progress, stop=stop)
        # Of the decompositions too: element-wise work beside them is little.
        self.numerics = plan.item_threads if any(item.mode == "generic" for item in plan.items) else threads

    def numeric_threads(self) -> AbstractContextManager[Any]:
        return threads_of_numerics(self.numerics)

    def write(self, segment: Segment) -> None:
        use_threads(self.numerics)
        super().write(segment)

    def merge_generic(self, pieces: Sequence[Piece]) -> list[Segment]:
        item = pieces[0].item
        if not item.factored:
            return super().merge_generic(pieces)
        use_threads(self.plan.item_threads)
        group = factored_group(self.plan, item)
        update, factor = update_of(self.steps_of(item), group, item.rule)
        self.sink.take(item.entry.name, Factors(update.left * factor, update.right), group.notes.facts)
        return []


def with_update(weight: AnyTensor, update: Spilled) -> Iterator[Tensor]:
    """The whole tensor in its own dtype, flat, a few entries at a time; update: of all of its rows, or of the first."""
    dtype = getattr(torch, TORCH_NAME[weight.dtype])
    for first in range(0, weight.numel, ENTRIES):
        found = torch.empty(min(ENTRIES, weight.numel - first), dtype=dtype)
        weight.read_into(bytes_of(found), first * dtype.itemsize)
        changed = found[: max(0, update.numel - first)]
        changed.copy_(changed.float() + update.part(first, changed.numel()))
        yield found
