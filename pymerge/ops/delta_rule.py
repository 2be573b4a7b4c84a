"""What an element-wise merge does to one tensor, as data.

Every element-wise method (linear, task arithmetic, SLERP, TIES, DARE, Breadcrumbs) is the same walk over the entries:

    d_t = W_t - W_0                       (or W_t itself where there is no base)
    d_t = 0 where the entry is not selected (random mask, magnitude window)
    x_t = weight_t * (rescale_t * d_t)
    drop x_t whose sign is not the elected one           (TIES)
    out = W_0 + scale * (sum_t x_t) / divisor

so a method only says WHICH walk: it returns a `DeltaRule`. The rule's open questions (which magnitude is the k-th
largest, what is the L1 norm) are answered by a `Survey` of the tensor, wherever the tensor lives: torch tensors, byte
buffers of a stream, a tensor too large for memory read in tiles, or a whole model. `resolve` asks them in the order in
which the mathematics needs them.

This module imports no torch: a merge from disk to disk runs on byte buffers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

Election = Literal["authors", "mergekit"]
Norm = Literal["none", "weights", "count", "max"]
KEEP_ALL_TIES = 2**63 - 1


def mask_key(seed: int, name: str, task: int) -> int:
    """64-bit Philox key of one task's random mask for one tensor: depends on nothing but these three."""
    digest = hashlib.blake2b(f"{seed}\0{task}\0{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """For each task and row: entries are ordered by (|d| descending, index ascending); the cut is the k-th of them.

    theta  float32 [T * R] as bytes; the magnitude at the cut
    index  int64 [T * R] as bytes; entries equal to theta belong to the first k when their index (within the tensor) is
           below this
    """

    theta: bytes
    index: bytes


@dataclass(frozen=True, kw_only=True)
class DeltaRule:
    """One element-wise merge of one tensor. Tuples have one entry a task. Defaults: the weighted sum of deltas."""

    weights: tuple[float, ...]
    scale: float = 1.0  # lambda
    divisor: float = 1.0  # constant part of a normalisation (sum of weights)
    # random mask (DARE): keep with this probability; key by mask_key(). None: no mask
    keep: tuple[float, ...] | None = None
    keys: tuple[int, ...] | None = None
    # magnitude window: keep the ranks skip[t] <= rank < top[t] of |d_t|, in rows of row_length entries (None: one row)
    top: tuple[int, ...] | None = None
    skip: tuple[int, ...] | None = None
    row_length: int | None = None
    keep_ties: bool = False  # keep every entry that equals the top-k threshold, not exactly k
    mask_first: bool = False  # magnitudes are ranked after the random mask (DARE, then trimming)
    rescale: Literal["none", "keep", "l1"] = "none"  # after selection: divide by keep | restore the tensor's L1 norm
    elect: Election | None = None
    norm: Norm = "none"  # per-entry normalisation among the entries that take part in the sum
    # SLERP and kin: coefficients from the Gram matrix [T][T] of the flattened tensors; replaces `weights`
    gram_weights: Callable[[Sequence[Sequence[float]]], tuple[float, ...]] | None = None
    # answered by resolve()
    rescales: tuple[float, ...] | None = None
    top_cut: Cut | None = None
    skip_cut: Cut | None = None
    tie_sign: int = 1  # elected sign where the weighted sum is exactly zero

    @property
    def needs_survey(self) -> bool:
        """Whether the tensor must be looked at before it can be merged."""
        return (
            self.gram_weights is not None
            or self.top is not None
            or self.skip is not None
            or self.rescale == "l1"
            or self.elect == "authors"
        )


class Survey(Protocol):
    """Answers a rule's questions about one tensor (or one model)."""

    def kth(self, ranks: tuple[int, ...], rule: DeltaRule, keep_ties: bool) -> Cut:
        """The cut after the first ranks[t] entries of each task (0: nothing; >= row length: everything)."""
        ...

    def l1(self, rule: DeltaRule) -> list[tuple[float, float]]:
        """(||d_t||_1, ||selected d_t||_1) of each task; the rule's cuts are set."""
        ...

    def gram(self) -> list[list[float]]:
        """Inner products of the flattened d_t, float64."""
        ...

    def signs(self, rule: DeltaRule) -> int:
        """sum over entries of sign(sum_t x_t); the rule's cuts and rescales are set."""
        ...


def resolve(rule: DeltaRule, survey: Survey) -> DeltaRule:
    """The same rule with every question answered: `delta_merge` can run it on any part of the tensor."""
    if rule.gram_weights is not None:
        rule = replace(rule, weights=rule.gram_weights(survey.gram()), gram_weights=None)
    if rule.top is not None:
        rule = replace(rule, top_cut=survey.kth(rule.top, rule, rule.keep_ties))
    if rule.skip is not None:
        rule = replace(rule, skip_cut=survey.kth(rule.skip, rule, False))
    if rule.rescale == "keep" and rule.keep is not None:
        rule = replace(rule, rescales=tuple(1.0 / p if p > 0 else 0.0 for p in rule.keep))
    if rule.rescale == "l1":
        # Norms below 1e-7 are left alone: restoring them would divide by rounding noise (mergekit's constant).
        rescales = tuple(a / b if a >= 1e-7 and b >= 1e-7 else 1.0 for a, b in survey.l1(rule))
        rule = replace(rule, rescales=rescales)
    if rule.elect == "authors":
        rule = replace(rule, tie_sign=1 if survey.signs(rule) > 0 else -1, elect="mergekit")
    return replace(rule, top=None, skip=None, rescale="none")
