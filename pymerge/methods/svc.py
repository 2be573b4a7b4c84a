"""Singular value calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pymerge.errors import NonFinite, RecipeError
from pymerge.methods.base import Auto, Calibrate, TaskGroup, TensorInfo, param, register
from pymerge.methods.work import NOTHING, Work, eigen, gram, passes

if TYPE_CHECKING:
    from torch import Tensor

_LEADING = 8  # divisors of the leading directions that merge.json lists


@register("svc")
@dataclass(frozen=True, kw_only=True)
class SVC(Calibrate):
    """Each singular direction of the update is divided by how often the tasks are counted in it.

    D = sum_r u_r p_r with p_r = s_r v_r; a task's response to a direction is a_tr = u_r^T D_t. Then
    D' = sum_r u_r p_r / eta_r, eta_r = mean_t max(alpha, <p_r, a_tr> / ||a_tr||^2).

    A task that does not respond counts as alpha (with `target` or mean_then_clip: leaves the direction as it is); an
    update of zero stays zero. Where all singular values of the update are equal (Iso-C, Iso-CTS) its directions are not
    defined by it: then those are used that the combine step built it from, unless basis is "recompute".

    Cost: a float64 Gram matrix and eigensolve of the smaller side k, and 2 (T + 2) m n k flops. Leaves in the summary,
    beside alpha, route and rank: eta (mean, least, most, those of the leading directions) and the shares of directions
    suppressed (eta > 1), amplified (eta < 1), at alpha, and of (task, direction) pairs without a response.
    """

    preset: Literal["default", "released"] = param(
        "default", "released: the authors' code, in what the defaults below depend on", choices=("default", "released")
    )
    alpha: float | None = param(
        Auto("1/T; after tsv_m: 1"), "least coefficient of a task; 1: only suppress", low=0, high=1, open_low=True
    )
    side: Literal["left", "right"] = param("left", "output or input directions", choices=("left", "right"))
    rule: Literal["clip_then_mean", "mean_then_clip"] = param(
        "clip_then_mean",
        "mean_then_clip: alpha bounds the mean, directions with a negative coefficient stay (the first release)",
        choices=("clip_then_mean", "mean_then_clip"),
    )
    target: int = param(-1, "calibrate for this task (from 0); -1: for all", low=-1)
    floor: Literal["relative", "absolute"] | None = param(
        Auto("relative; released: absolute", str),
        "responses that count as none: within float32 rounding of the task, or 1e-12 whatever its size",
        choices=("relative", "absolute"),
    )
    basis: Literal["base", "recompute"] | None = param(
        Auto("base; released: recompute", str),
        "base: the singular directions that iso_c and iso_cts built the update from",
        choices=("base", "recompute"),
    )
    rank: int | None = param(
        Auto("all", int),
        "leading directions to calibrate; needs alpha 1; all are, where one of the next ones would change too",
        low=1,
    )

    paper = "arXiv 2602.05536"
    spectral = True

    @property
    def on_cores(self) -> bool:
        return True

    def conflicts(self) -> list[str]:
        problems = []
        if self.rank is not None and self.alpha != 1.0:
            problems.append("rank: the rest stays as it is, which is right for alpha: 1 alone; give that, or no rank")
        if self.target >= 0 and self.rule != "clip_then_mean":
            problems.append("rule: has no meaning with a target, leave one of them out")
        return problems

    def workspace(self, info: TensorInfo) -> int:
        if len(info.shape) != 2:
            return 0  # such tensors are not calibrated
        m, n = info.shape
        k = min(m, n)
        widened = 16 * k * min(max(m, n), 2048)  # to float64 and contiguous, by the Gram matrix
        return widened + 24 * k * k + 4 * k * (m + n)  # Gram matrix, eigenvectors; directions and responses

    def work(self, info: TensorInfo) -> Work:
        """All singular directions of the update, the responses of the update and the tasks to them, the update."""
        if len(info.shape) != 2:
            return NOTHING
        m, n = info.shape
        k = min(m, n)
        directions = gram(k, max(m, n)) + eigen(k) + Work(double=2.0 * m * n * k if m > n else 0.0)
        return directions + Work(single=2.0 * (info.tasks + 2) * m * n * k) + passes(info.numel, info.tasks + 2)

    def calibrate(self, update: Tensor, group: TaskGroup) -> Tensor:
        from pymerge.methods._svc_directions import Divisors, calibration

        tasks = len(group.tuned)
        if self.target >= tasks:
            raise RecipeError(f"svc: {group.info.name}: target: {self.target} of {tasks} models, counted from 0")
        alpha = self.alpha or (1.0 if group.notes.combine == "tsv_m" else 1.0 / tasks)
        update = update.float()
        if _is_zero(update, group.info.name):
            group.notes.facts.update(svc_alpha=alpha, svc_route="zero", svc_rank=0)
            return update
        right = self.side == "right"  # output directions of the transposed matrices
        base, tuned = group.base, group.tuned if self.target < 0 else group.tuned[self.target : self.target + 1]
        divisors = Divisors(
            base=base.mT if right and base is not None else base,
            tuned=[t.mT if right else t for t in tuned],
            alpha=alpha,
            floor=self.floor or ("absolute" if self.preset == "released" else "relative"),
            rule=self.rule,
            target=self.target >= 0,
        )
        rows = update.mT if right else update
        found = calibration(rows, self._given(group), self.rank, divisors)
        group.notes.facts.update(svc_alpha=alpha, svc_route=found.route, svc_rank=found.d.rank)
        group.notes.facts.update(svc_silent=found.silent, **_spread(found.eta, alpha))
        group.notes.facts.update(_spectra(found.d.p, found.eta))
        found.apply(rows)
        return update

    def _given(self, group: TaskGroup) -> Tensor | None:
        """The combine step's directions, where it gave some and they are wanted."""
        basis = self.basis or ("recompute" if self.preset == "released" else "base")
        if basis == "recompute" or group.notes.basis is None:
            return None
        u, v = group.notes.basis()
        return v if self.side == "right" else u


def _is_zero(update: Tensor, name: str) -> bool:
    if update.numel() == 0:
        return True
    low, high = (float(x) for x in update.aminmax())
    if not math.isfinite(low) or not math.isfinite(high):
        raise NonFinite(f"svc: {name}: the update to calibrate has NaN or infinite entries: look at the steps before")
    return low == high == 0.0


def _spread(eta: Tensor, alpha: float) -> dict[str, Any]:
    """Of the divisors [k], in words of the summary."""

    def share(where: Tensor) -> float:
        return float(where.double().mean())

    return {
        "svc_eta_mean": float(eta.mean()),
        "svc_eta_least": float(eta.min()),
        "svc_eta_most": float(eta.max()),
        "svc_eta_leading": eta[:_LEADING].tolist(),
        "svc_suppressed": share(eta > 1),
        "svc_amplified": share(eta < 1),
        "svc_at_alpha": share(eta <= alpha * (1 + 1e-12)),  # a mean of alphas may round up
    }


def _spectra(p: Tensor, eta: Tensor) -> dict[str, list[float]]:
    """How large the update is along its directions 1, 2, 4, 8 ..: before, and divided by eta. Of singular directions
    these are singular values. p [k, n], eta [k]."""
    at = [2**i - 1 for i in range(len(eta).bit_length())]
    size = p[at].double().norm(dim=1)
    after = size / eta[at].to(size)
    return {"svc_before": [_rounded(x) for x in size.tolist()], "svc_after": [_rounded(x) for x in after.tolist()]}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
