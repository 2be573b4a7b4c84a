"""Singular value calibration of one matrix by its left directions: which, their divisors, the rescaled update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pymerge.linalg import _dense, truncated_svd
from pymerge.ops.delta_gram import delta_gram
from pymerge.ops.projection_stats import projection_stats

Floor = Literal["relative", "absolute"]
Rule = Literal["clip_then_mean", "mean_then_clip"]

_ABSOLUTE = 1e-12  # squared response; lyymuwu/SVC merge_func.py, coef_cal_multi_ranks
_RELATIVE = 30.0  # times sqrt(max(m, n)) float32 roundings of a task's norm: responses below are noise (measured)
_ROWS = 256  # widened to float64 at a time
_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Directions:
    """Orthonormal left directions q [m, k] of an update D and its response to each, p = q^T D [k, n], both float32.

    complete   D = q p: nothing of the update is outside these directions
    """

    q: Tensor
    p: Tensor
    complete: bool

    @property
    def rank(self) -> int:
        return self.q.shape[1]


def all_directions(update: Tensor) -> Directions:
    """All min(m, n) left singular directions, from the float64 Gram matrix of the smaller side: faster than LAPACK's
    float32 SVD (768 x 768 1.2 times, 4:1 1.4 to 1.7 times; benchmarks/bench_svc.py --parts), right to float32 rounding.

    m > n: the right ones V are computed, then q_r = D v_r / s_r and p_r = s_r v_r. The product is taken in float64: its
    rounding is divided by s_r. Where D v_r = 0, q_r is 0 as well."""
    m, n = update.shape
    if m <= n:
        q = _dense.top_eigh(_dense.gram(update), m)[1].float()
        return Directions(q, q.mT @ update, True)
    v = _dense.top_eigh(_dense.gram(update.mT), n)[1]  # [n, n]
    q, square = update.new_empty(m, n), v.new_zeros(n)
    for rows, out in zip(update.split(_ROWS), q.split(_ROWS), strict=True):
        y = rows.double() @ v
        square += y.square().sum(0)
        out.copy_(y)
    s = square.sqrt().float()
    return Directions(q.div_(s.clamp(min=torch.finfo(s.dtype).tiny)), (v.float() * s).mT, True)


def given_directions(update: Tensor, q: Tensor) -> Directions:
    """Directions that the combine step built the update from."""
    q = q.to(update)
    return Directions(q, q.mT @ update, q.shape[1] == min(update.shape))


def leading_directions(update: Tensor, rank: int) -> Directions:
    """The `rank` leading singular directions; the rest of the update is outside."""
    found = truncated_svd(update, rank)
    return Directions(found.U, found.S[:, None] * found.Vh, False)


@dataclass(frozen=True, kw_only=True)
class Divisors:
    """eta_r, from the responses of the tasks to the directions of an update.

    base, tuned   as in TaskGroup: of all tasks or, with target, of the one to calibrate for
    """

    base: Tensor | None
    tuned: Sequence[Tensor]
    alpha: float
    floor: Floor
    rule: Rule
    target: bool

    def of(self, d: Directions) -> tuple[Tensor, float]:
        """eta, float64 [k], and the share of (task, direction) pairs without a response."""
        s, silent = coefficients(d, self.base, self.tuned, self.floor)
        if self.target:
            return torch.where(s[0] > 0, s[0].clamp(min=self.alpha), 1.0), silent
        if self.rule == "mean_then_clip":
            return torch.where((s > 0).all(0), s.mean(0).clamp(min=self.alpha), 1.0), silent
        return s.clamp(min=self.alpha).mean(0), silent


def coefficients(d: Directions, base: Tensor | None, tuned: Sequence[Tensor], floor: Floor) -> tuple[Tensor, float]:
    """s_tr = <p_r, a_tr> / ||a_tr||^2 with a_tr = q_r^T (tuned_t - base), and the share of responses at the floor.

    relative   s = 0 where ||a_tr|| <= 30 sqrt(max(m, n)) eps32 ||tuned_t - base||_F: such a response is rounding noise
    absolute   ||a_tr||^2 is raised to 1e-12, as released
    Returns    float64 [T, k], share of the (task, direction) pairs"""
    inner, square = projection_stats(d.q, d.p, base, tuned)
    if floor == "absolute":
        silent = square <= _ABSOLUTE
        return inner / square.clamp(min=_ABSOLUTE), float(silent.double().mean())
    size = torch.stack([delta_gram(base, [t])[0, 0] for t in tuned])[:, None]  # ||D_t||_F^2
    silent = square <= (_RELATIVE * _EPS) ** 2 * max(tuned[0].shape) * size
    return torch.where(silent, 0.0, inner / torch.where(silent, 1.0, square)), float(silent.double().mean())


@dataclass(frozen=True)
class Calibration:
    """Directions and what each is divided by: eta float64 [k]; silent: share of pairs without a response."""

    route: str
    d: Directions
    eta: Tensor
    silent: float

    def apply(self, update: Tensor) -> None:
        """update <- sum_r q_r p_r / eta_r + what of it is outside the directions. Overwrites d.p."""
        if bool((self.eta == 1).all()):
            return
        q, p = self.d.q, self.d.p
        if self.d.complete:
            torch.mm(q, p.div_(self.eta.to(p)[:, None]), out=update)
        else:
            update.addmm_(q, p.mul_((1 / self.eta - 1).to(p)[:, None]))


def calibration(update: Tensor, given: Tensor | None, rank: int | None, divisors: Divisors) -> Calibration:
    """By the directions `given` [m, k]; or by the leading `rank`, if that changes nothing; or by all."""
    if given is not None:
        d = given_directions(update, given)
        return Calibration("base", d, *divisors.of(d))
    found = truncated(update, rank, divisors) if rank is not None else None
    if found is not None:
        return found
    d = all_directions(update)
    return Calibration("gram", d, *divisors.of(d))


def truncated(update: Tensor, rank: int, divisors: Divisors) -> Calibration | None:
    """By the leading `rank` directions. One block more is looked at: None where one of its divisors is not 1, or where
    that would be all directions."""
    tested = rank + max(16, rank // 8)
    if tested >= min(update.shape):
        return None
    d = leading_directions(update, tested)
    eta, silent = divisors.of(d)
    if bool((eta[rank:] != 1).any()):
        return None
    return Calibration("truncated", Directions(d.q[:, :rank], d.p[:rank], False), eta[:rank], silent)
