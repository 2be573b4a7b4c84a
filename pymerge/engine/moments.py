"""What one read of all models' bytes tells of their updates: norms, inner products, signs, magnitudes.

Each thread reads a tile of every model into a buffer that stays in its processor's cache, and counts it there.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

import numpy as np

from pymerge import _C
from pymerge.checkpoint import ITEMSIZE, AnyTensor, LazyTensor, MemoryTensor, safe_name
from pymerge.engine.arena import address_of
from pymerge.engine.non_finite import count_non_finite, unravel
from pymerge.errors import NonFinite, RecipeError

if TYPE_CHECKING:
    from pymerge.engine.execute import Progress

TILE = 1 << 17  # entries of a tile; fixed, so that no bit depends on memory or threads
COMPUTED_TILE = 1 << 20  # of tensors that are computed where they are read (adapters, fp8), in blocks of their own
OCTAVES, FIRST_OCTAVE = 32, -31  # kOctaves, kFirstOctave of csrc/cpu/kernels.h
ALIGNED = 64


@dataclass(frozen=True)
class Compared:
    """A tensor of the base and of all T models; one that is the base's very own was not changed (adapters)."""

    base: AnyTensor
    tuned: tuple[AnyTensor, ...]

    @property
    def inputs(self) -> tuple[AnyTensor, ...]:
        return self.base, *(tensor for tensor in self.tuned if tensor is not self.base)

    @property
    def tile(self) -> int:
        plain = all(isinstance(tensor, LazyTensor | MemoryTensor) for tensor in self.inputs)
        return TILE if plain else COMPUTED_TILE


@dataclass(frozen=True)
class Moments:
    """Sums over entries of the base W and of the updates D_t = W_t - W of T models; moments of tensors add up.

    entries      how many
    base         sum of W^2
    l1_of_sum    sum of |D_1 + ... + D_T|
    gram         [T, T] inner products of D_s and D_t
    l1           [T] sums of |D_t|
    octaves      [T, 32] entries by magnitude: bin 0 below 2^-30, bin b from 2^(b - 31) on, the last from 1 on
    both         [T, T] entries that both models change; on the diagonal that the model changes
    opposed      [T, T] those of them that the two change in opposite directions
    contested    entries that two models or more change
    conflicted   those of them that one raises and another one lowers

    Differences are of float32, sums of float64."""

    entries: int
    base: float
    l1_of_sum: float
    gram: np.ndarray
    l1: np.ndarray
    octaves: np.ndarray
    both: np.ndarray
    opposed: np.ndarray
    contested: int
    conflicted: int

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def tasks(self) -> int:
        return len(self.l1)

    @classmethod
    def of(cls, entries: int, tasks: int, sums: np.ndarray, counts: np.ndarray) -> Moments:
        """From the sums and counts of `_C.delta_moments`."""
        pairs, bins = tasks * tasks, tasks * OCTAVES
        both, opposed = (counts[at : at + pairs].reshape(tasks, tasks) for at in (2 + bins, 2 + bins + pairs))
        return cls(
            entries=entries,
            base=float(sums[0]),
            l1_of_sum=float(sums[1]),
            gram=mirrored(sums[2 : 2 + pairs].reshape(tasks, tasks)),
            l1=sums[2 + pairs :],
            octaves=counts[2 : 2 + bins].reshape(tasks, OCTAVES),
            both=mirrored(both),
            opposed=mirrored(opposed),
            contested=int(counts[0]),
            conflicted=int(counts[1]),
        )


def mirrored(upper: np.ndarray) -> np.ndarray:
    """The symmetric matrix with this upper triangle."""
    return np.triu(upper) + np.triu(upper, 1).T


class Sweep:
    """One pass over tensors: `run` returns the moments of each.

    labels   what base and models are called"""

    def __init__(self, tensors: Sequence[Compared], labels: Sequence[str], progress: Progress) -> None:
        self.tensors, self.labels, self.progress = tensors, labels, progress
        self.lock = threading.Lock()
        self.units = self.all_units()
        self.parts: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]] = {}  # tensor -> tile -> sums, counts
        self.found: dict[int, Moments] = {}
        self.stopped = False
        self.room = max(sum(t.tile * ITEMSIZE[i.dtype] + ALIGNED for i in t.inputs) for t in tensors)  # of a thread

    def run(self, threads: int) -> list[Moments]:
        """Raises NonFinite (model, tensor, first place), InputError (files that cannot be read).

        Cost   each byte read once, T (T + 1) / 2 multiply-adds in float64 an entry; a tile of each model a thread"""
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(self.work) for _ in range(threads)]
            try:
                for future in futures:
                    future.result()
            finally:
                self.stopped = True
        return [self.found[i] for i in range(len(self.tensors))]

    def all_units(self) -> Iterator[tuple[int, int, int]]:
        """(tensor, first entry, entries) in the order of the base's files."""
        for number, compared in enumerate(self.tensors):
            for first in range(0, compared.base.numel, compared.tile):
                yield number, first, min(compared.tile, compared.base.numel - first)

    def next_unit(self) -> tuple[int, int, int] | None:
        with self.lock:
            return None if self.stopped else next(self.units, None)

    def work(self) -> None:
        buffer = mmap.mmap(-1, self.room)
        view, address = memoryview(buffer), address_of(buffer)
        try:
            while (unit := self.next_unit()) is not None:
                self.count(*unit, view, address)
        except BaseException:
            self.stopped = True
            raise

    def count(self, number: int, first: int, count: int, view: memoryview, address: int) -> None:
        """One tile: read, counted, and put with the others of its tensor."""
        compared, places, at, read = self.tensors[number], {}, 0, 0
        for tensor in compared.inputs:
            width = ITEMSIZE[tensor.dtype]
            if isinstance(tensor, MemoryTensor) and tensor.lendable:
                places[id(tensor)] = (address_of(tensor.lend(first * width, count * width)), tensor.dtype)
                continue
            tensor.read_into(view[at : at + count * width], first * width)
            places[id(tensor)] = (address + at, tensor.dtype)
            at += -(-count * width // ALIGNED) * ALIGNED
            read += count * width
        tuned = [places[id(tensor)] for tensor in compared.tuned]
        sums, counts = map(np.frombuffer, _C.delta_moments(places[id(compared.base)], tuned, count), (float, np.int64))
        with self.lock:
            self.add(number, first, sums, counts)
            self.progress.advance(read, compared.base.name)

    def add(self, number: int, first: int, sums: np.ndarray, counts: np.ndarray) -> None:
        """Keeps a tile's sums until all of the tensor's are there; added in order, whichever thread was first."""
        compared = self.tensors[number]
        parts = self.parts.setdefault(number, {})
        parts[first] = (sums, counts)
        if len(parts) < math.ceil(compared.base.numel / compared.tile):
            return
        tasks = len(compared.tuned)
        ordered = [parts[first] for first in sorted(parts)]
        sums, counts = (reduce(add, column) for column in zip(*ordered, strict=True))
        if counts[-1 - tasks :].any():
            self.refuse(compared)
        self.found[number] = Moments.of(compared.base.numel, tasks, sums, counts)
        del self.parts[number]

    def refuse(self, compared: Compared) -> None:
        texts = []
        for label, tensor in zip(self.labels, (compared.base, *compared.tuned), strict=True):
            bad, first = count_non_finite(tensor)
            if bad:
                place = list(unravel(first, tensor.shape))
                texts.append(f"{label}: {bad} of {tensor.numel} entries, the first at {place}")
        raise NonFinite(
            f"{safe_name(compared.base.name)}: NaN or Inf in {'; '.join(texts)}. Mend the model, or leave the "
            "tensor out (--exclude, exclude=)"
        )


def sweep(
    tensors: Sequence[Compared], labels: Sequence[str], *, threads: int, memory: int, progress: Progress
) -> list[Moments]:
    """The moments of each tensor: see Sweep. Raises RecipeError where a tile of each model does not fit the memory."""
    found = Sweep(tensors, labels, progress)
    if found.room > memory:
        raise RecipeError(
            f"a tile of each of {len(labels)} models takes {found.room / 1e6:.0f} MB, the memory budget leaves "
            f"{memory / 1e6:.0f} MB: raise --memory (memory= in Python) by {(found.room - memory) / 1e6:.0f} MB"
        )
    return found.run(min(threads, memory // found.room))
