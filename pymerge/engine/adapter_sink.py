"""Merged updates as the tensors of a LoRA adapter: factors of matrices, all else whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymerge.checkpoint import ITEMSIZE, AnyTensor
from pymerge.engine.check import Entry
from pymerge.engine.execute import Executor
from pymerge.engine.factored import factored_group, update_of
from pymerge.engine.piece import Piece
from pymerge.engine.pipeline import Segment
from pymerge.linalg import truncated_svd
from pymerge.methods.base import Factors
from pymerge.methods.cores import orthonormal


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


class AdapterSink:
    """Collects what an adapter is made of; each update is dropped when its factors are known.

    low    matrix -> its factors;  whole  other tensors that the merge changes -> their update
    """

    done: Mapping[str, Sequence[tuple[int, int, int]]] = {}

    def __init__(self, entries: Sequence[Entry], matrices: set[str], rank: int | None) -> None:
        self.entries = {entry.name: entry for entry in entries}
        self.matrices, self.rank = matrices, rank
        self.open: dict[str, tuple[Tensor, int]] = {}  # tensors that are not complete: values, bytes that are missing
        self.low: dict[str, Low] = {}
        self.whole: dict[str, Tensor] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    def forget(self, name: str) -> None:
        """Nothing was ever finished before."""

    def read_into(self, name: str, view: memoryview) -> None:
        raise ValueError(f"{name}: what is merged is not kept; steps that look at it are refused before")

    def write(self, name: str, start: int, view: memoryview, crc: int, facts: Mapping[str, Any]) -> None:
        if name not in self.open:
            shape = self.entries[name].shape
            self.open[name] = torch.empty(shape), torch.Size(shape).numel() * ITEMSIZE["F32"]
        values, missing = self.open[name]
        values.reshape(-1).view(torch.uint8).numpy().data[start : start + len(view)] = view
        self.open[name] = values, missing - len(view)
        if facts:
            self.facts.setdefault(name, {}).update(facts)
        if missing == len(view):
            del self.open[name]
            self.finish(name, values)

    def finish(self, name: str, update: Tensor) -> None:
        if not update.any():
            return
        if name in self.matrices:
            assert self.rank is not None
            self.low[name] = low_of_matrix(update, self.rank)
        else:
            self.whole[name] = update

    def take(self, name: str, update: Factors, facts: Mapping[str, Any]) -> None:
        self.facts[name] = dict(facts)
        if name in self.matrices:
            self.low[name] = low_of_factors(update, self.rank)
        else:
            self.finish(name, update.left @ update.right)


class AdapterExecutor(Executor):
    """Hands over the updates of adapters as the factors that they are."""

    sink: AdapterSink  # type: ignore[assignment]

    def merge_generic(self, pieces: Sequence[Piece]) -> list[Segment]:
        from pymerge.engine.generic import use_threads

        item = pieces[0].item
        if not item.factored:
            return super().merge_generic(pieces)
        use_threads(self.plan.item_threads)
        group = factored_group(self.plan, item)
        update, factor = update_of(self.steps_of(item), group, item.rule)
        self.sink.take(item.entry.name, Factors(update.left * factor, update.right), group.notes.facts)
        return []


def with_update(weight: AnyTensor, update: Tensor) -> Tensor:
    """The whole tensor in its own dtype; update: of all of its rows, or of the first."""
    found = weight.load().clone()
    rows = found[: len(update)] if found.dim() else found
    rows.copy_(rows.float() + update)
    return found
