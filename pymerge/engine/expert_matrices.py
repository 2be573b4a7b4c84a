"""Experts stored as one tensor, for methods that decompose matrices: those of each expert are matrices of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pymerge.checkpoint import Checkpoint
from pymerge.checkpoint.expert_layouts import FUSED, is_turned, spelt


@dataclass(frozen=True, kw_only=True)
class Part:
    """One matrix within a tensor of all experts.

    key    among the tensor's parts: number and name of the expert's matrix
    name   as the tensor that it is where each expert has its own
    first  entry of the tensor with which it begins
    split  as of an Entry: it is two matrices side by side"""

    key: str
    name: str
    shape: tuple[int, int]
    first: int
    split: tuple[int, tuple[int, ...]] | None = None

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def expert_parts(reference: Checkpoint, name: str) -> tuple[Part, ...]:
    """The matrices that a tensor [E, m, n] of all experts holds, in their order: gate and up apart, as in a model with
    tensors for each expert. Those of gpt-oss, whose columns alternate, stay one."""
    experts, m, n = reference[name].shape
    prefix, _, what = spelt(name).rpartition(".")
    known = {spelt(own): own for own in (name, name.replace("gate_up", "down"), name.replace("input_", "output_"))}
    known = {spelling: own for spelling, own in known.items() if own in reference}
    whats, split = FUSED.get(what, (what,)), None
    if f"{name}_bias" in reference or f"{prefix}.down_proj" not in known:
        whats = (what,)
    elif len(whats) > 1 and is_turned(reference, known, prefix):
        whats, split = (what,), (1, (n // 2, n // 2))
    elif m % len(whats):
        whats = (what,)
    rows = m // len(whats)
    return tuple(
        Part(
            key=f"{number}.{matrix}",
            name=f"{prefix}.{number}.{matrix}.weight",
            shape=(rows, n),
            first=(number * len(whats) + at) * rows * n,
            split=split,
        )
        for number in range(experts)
        for at, matrix in enumerate(whats)
    )
