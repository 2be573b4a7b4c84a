"""PAVE: task vectors without the output directions that matter least for the task's own inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pymerge.errors import RecipeError
from pymerge.methods.base import Auto, PerModel, TaskGroup, TensorInfo, param, per_task, register
from pymerge.methods.surveyed import SurveyedPurify
from pymerge.methods.work import NOTHING, Work, eigen, gram, passes

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.methods._pave_subspace import Ridge

Searched = dict[str, tuple[int, tuple[int, ...]]]  # matrix -> its min(m, n), the rank of each model


@register("pave")
@dataclass(frozen=True, kw_only=True)
class Pave(SurveyedPurify):
    """tau_t = D_t - U_d U_d^T W_t: U_d are the left singular directions of W_t F_t that belong to its smallest values.

    F_t is made of C_t = X_t^T X_t / N_t + eps I, X_t the inputs of the layer in model t. Of K = min(m, n) directions
    r = max(1, round(K ratio_t)) stay. model_mean: one ratio a model, the mean over all matrices of the ranks that a
    search shares out among the models, matrix by matrix, by their normalised singular values; per_layer: those ranks
    themselves; none: ratio_t = rank_ratio. A part of the base weight goes with the task's: D_t = 0 does not give 0.

    Matrices without statistics and all other tensors keep their plain difference. Zero weights lose nothing. eps is
    doubled until the condition of C is at most max_condition; the summary has it. Must be the first purify step.

    Cost: per task 2 m n^2 multiply-adds (4 m n N where the rows are kept), a float64 Gram matrix and a range
    eigensolve of K; the search once more, with all eigenvalues. Above a condition of 1e5 a float64 QR of [m, n] more.
    """

    rank_ratio: PerModel = param(0.984375, "rho, share of directions to keep", low=0, high=1, per_model=True)
    allocation: Literal["model_mean", "per_layer", "none"] = param(
        "model_mean", "how the directions to lose are shared among models", choices=("model_mean", "per_layer", "none")
    )
    metric: Literal["cov", "chol", "diag", "none"] = param(
        "cov", "F: C, its Cholesky factor, a diagonal, or 1", choices=("cov", "chol", "diag", "none")
    )
    eps: PerModel = param(0.1, "ridge of C", low=0, open_low=True, per_model=True)
    search_eps: float | None = param(Auto("eps"), "ridge of C in the search for ranks", low=0, open_low=True)
    eps_mode: Literal["absolute", "relative"] = param(
        "absolute", "relative: times the mean of diag C", choices=("absolute", "relative")
    )
    max_condition: float = param(1e4, "of C, by doubling eps; 0: eps as it is", low=0)
    divisor: int | None = param(Auto("the rows seen", int), "what X^T X is divided by", low=1)
    floor_factor: float = param(1.5, "a model loses at most this times its even share", low=1)

    paper = "arXiv 2510.14697"
    needs = ("covariance",)
    spectral = True
    whole_weights = True

    def conflicts(self) -> list[str]:
        problems = []
        if isinstance(self.rank_ratio, tuple) and len(set(self.rank_ratio)) > 1 and self.allocation != "none":
            problems.append("rank_ratio: the search shares one ratio among the models; give one, or allocation: none")
        if 0 < self.max_condition <= 1:
            problems.append("max_condition: must be above 1, or 0")
        return problems

    def workspace(self, info: TensorInfo) -> int:
        if len(info.shape) != 2:
            return 0
        m, n = info.shape
        k = min(m, n)
        return 8 * (3 * n * n + 4 * m * n + 4 * k * k)

    def work(self, info: TensorInfo) -> Work:
        """Activated weights of each task, once more with their singular values where the ranks are searched for, and
        the directions that are dropped."""
        if len(info.shape) != 2:
            return NOTHING
        m, n = info.shape
        k = min(m, n)
        lost = k - round(k * min(per_task(self.rank_ratio, info.tasks)))
        activated = Work(double=2.0 * m * n**2) + passes(info.numel + 2 * n * n, 4)
        found = gram(k, max(m, n)) + eigen(k, lost / k) + Work(double=4.0 * m * n * lost)
        searched = activated + gram(k, max(m, n)) + eigen(k, 0.0)
        return (activated + found + (NOTHING if self.allocation == "none" else searched)).times(info.tasks)

    @property
    def asks(self) -> bool:
        return self.allocation == "model_mean"

    def survey(self, group: TaskGroup) -> Searched:
        """The ranks that the search gives the models in this matrix."""
        if group.inputs is None:
            return {}
        found = self._searched(group)
        return {group.info.name: (min(group.tuned[0].shape), tuple(found))}

    def join(self, one: Searched, other: Searched) -> Searched:
        return one | other

    def decide(self, answer: Searched | None) -> Pave:
        """The step with each model's mean ratio."""
        total = sum(k for k, _ in (answer or {}).values())
        if not total or answer is None:
            return replace(self, allocation="none")
        tasks = len(next(iter(answer.values()))[1])
        ratios = tuple(sum(found[t] for _, found in answer.values()) / total for t in range(tasks))
        return replace(self, allocation="none", rank_ratio=ratios)

    def purify(self, group: TaskGroup) -> tuple[Tensor, ...]:
        from pymerge.methods import _pave_subspace as subspace

        step = self.decide(self.survey(group)) if self.asks else self
        facts, tasks = group.notes.facts, len(group.tuned)
        if group.inputs is None:
            facts["pave"] = "plain difference: no statistics"
            return tuple(group.delta(t) for t in range(tasks))
        k = min(group.tuned[0].shape)
        ratios = per_task(step.rank_ratio, tasks, "rank_ratio")
        found = [round(k * ratio) for ratio in ratios] if step.allocation == "none" else step._searched(group)
        kept, used, vectors = [max(1, rank) for rank in found], [], []
        for t, seen in enumerate(group.inputs):
            delta = group.delta(t)
            eps = 0.0
            if kept[t] < k:
                weight = self._weight(group, t)
                p, eps = subspace.activated(weight, seen, self.metric, self.divisor, self._ridge(t, tasks))
                delta = subspace.purified(weight, delta, p, kept[t])
            used.append(eps)
            vectors.append(delta)
        facts["pave_ranks"], facts["pave_eps"] = kept, used
        return tuple(vectors)

    def _searched(self, group: TaskGroup) -> list[int]:
        """Ranks of the models in this matrix."""
        from pymerge.methods import _pave_subspace as subspace

        assert group.inputs is not None
        tasks, spectra = len(group.tuned), []
        for t, seen in enumerate(group.inputs):
            ridge = self._ridge(t, tasks, search=True)
            p, _ = subspace.activated(self._weight(group, t), seen, self.metric, self.divisor, ridge)
            spectra.append(subspace.spectrum(p))
        return subspace.ranks(spectra, per_task(self.rank_ratio, tasks, "rank_ratio")[0], self.floor_factor)

    def _ridge(self, task: int, tasks: int, *, search: bool = False) -> Ridge:
        from pymerge.methods._pave_subspace import Ridge

        eps = per_task(self.eps, tasks, "eps")[task]
        start = self.search_eps if search and self.search_eps is not None else eps
        return Ridge(start=start, relative=self.eps_mode == "relative", max_condition=self.max_condition)

    def _weight(self, group: TaskGroup, task: int) -> Tensor:
        """W_t, float64."""
        if group.base is None:
            raise RecipeError(f"{group.info.name}: pave needs the models' weights: make it the first purify step")
        return group.tuned[task].double()
