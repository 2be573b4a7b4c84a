"""ACE: the RegMean closed form with each task's own update in place of its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pymerge.methods.base import Auto, MatrixCombine, TaskGroup, TensorInfo, param, register
from pymerge.methods.work import Work, cholesky_solve, passes

if TYPE_CHECKING:
    from torch import Tensor

BLOCKED = 1.125  # a triangle of a Gram matrix is computed in eight blocks of columns
Preset = Literal["default", "released"]
Gate = Literal["released", "var_log", "homogeneous", "heterogeneous"]
Refine = Literal["auto", "always", "never"]


@register("ace")
@dataclass(frozen=True, kw_only=True)
class Ace(MatrixCombine):
    """Average the updates of a weight matrix, each weighted by its own second moment: RegMean without data.

    X = (sum D_t (S_t + eps_t)) (sum S_t + eps_t + 1 c)^-1 with D_t centred over the outputs, S_t = D_t^T D_t and
    c = column means of sum S_t. Where the energies |D_t|^2 of the tasks are unequal (`gate`), S_t and eps_t are
    divided by the trace of S_t, c by the mean energy, and a share of the singular directions of X + residual is added
    with one common singular value.

    default   tasks whose update is zero, or the same in every row, are left out of the sums; no refinement where
              eps mean(1/trace) > 0.1 (it would oppose the tasks)
    released  eps 1e-2, every task and every refinement, as the authors' code
    Both      at least one direction is refined (the authors' code gives NaN for matrices of fewer than four rows or
              columns); a matrix without centred part (one row, zero updates) gives zero; eps is raised where it is
              below what float64 resolves (reported as `eps`).

    A fused matrix (qkv, gate and up) is one problem, with another result than its parts have: see `split`.

    Facts per tensor: gamma, branch, ebar, route (dense | push_through), precision, condition, k, sigma, refinement,
    cosine (to the average of the task vectors), skipped (tasks).
    """

    preset: Preset = param("default", "guarded, or as the authors' code", choices=("default", "released"))
    eps: float = param(Auto("1e-5; released: 1e-2"), "ridge added to each S_t", low=0, open_low=True)
    tau: float = param(0.3, "gamma above it: the energies are unequal", low=0)
    k_frac: float = param(0.3, "share of the singular directions that are refined", low=0, high=1, open_low=True)
    scale: float = param(1.0, "multiplies the update")
    center: bool = param(True, "centre the updates that are averaged, not only those in S_t")
    keep_mean: Literal["none", "average"] = param(
        "none", "what is put back of the column means that centring takes out", choices=("none", "average")
    )
    prior: Literal["broadcast", "none"] = param("broadcast", "the term 1 c", choices=("broadcast", "none"))
    gate: Gate = param(
        "released",
        "gamma: Var(log e) / mean(log e)^2 (released; depends on the scale of the updates), Var(log e), or a fixed"
        " branch",
        choices=("released", "var_log", "homogeneous", "heterogeneous"),
    )
    refine: Refine = param(
        Auto("auto; released: always", str),
        "refinement where energies are unequal; auto: unless eps mean(1/trace) > 0.1",
        choices=("auto", "always", "never"),
    )

    paper = "arXiv 2603.02945"

    @property
    def on_cores(self) -> bool:
        return True

    def conflicts(self) -> list[str]:
        if self.keep_mean == "average" and not self.center:
            return ["keep_mean: average has no meaning with center: false, which keeps the column means already"]
        return []

    def combine(self, group: TaskGroup) -> Tensor:
        from pymerge.methods._ace import merge_matrix

        return merge_matrix(self, group)

    def workspace(self, info: TensorInfo) -> int:
        m, n = info.shape
        rows = info.tasks * m
        if rows <= n:  # the stacked rows, their inner products; right-hand sides and solutions; results
            return 4 * rows * n + 8 * (rows**2 + 6 * m * rows + 3 * m * n)
        return 8 * (n**2 + min(m, n) ** 2 + 7 * m * n)

    def work(self, info: TensorInfo) -> Work:
        """D (D^T D + e) of each task and one solve, without the refinement of unequal energies. Systems [n, n] are
        tried in float32 first and counted in float64 too, which updates of decaying spectra need; others take half of
        this or less. Small systems, of T m rows, know at once."""
        m, n = info.shape
        rows = info.tasks * m
        if rows <= n:
            products = Work(double=BLOCKED * rows**2 * n + 2.0 * m * rows * n)
            return products + cholesky_solve(rows, m) + passes(info.numel, 8 * info.tasks)
        of_rows = 0.0 if m >= n else BLOCKED * rows * n**2
        products = (2.0 + BLOCKED) * info.tasks * m * n * min(m, n) + of_rows
        system = cholesky_solve(n, m) + Work(double=products)
        return system + Work(single=system.double) + passes(info.numel, 20 * info.tasks)
