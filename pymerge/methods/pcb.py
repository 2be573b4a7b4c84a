"""PCB-Merging: parameters compete within each task and balance between tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pymerge.methods.base import Combine, TensorInfo, param, register
from pymerge.methods.surveyed import SurveyedCombine

if TYPE_CHECKING:
    from pymerge.methods.base import TaskGroup

Scope = Literal["tensor", "global"]


@register("pcb")
@dataclass(frozen=True, kw_only=True)
class Pcb(SurveyedCombine):
    """scale * sum_t v_t x_t / sum_t v_t with weights in [0, 1] for each entry and task.

    x_t     the task vector D_t, magnitudes clipped to its order statistics int(1e-4 n) and int((1 - 1e-4) n - 1)
    within  exp(T s_t^2), s_t = |x_t| mapped to [0, 1]: large entries of a task win
    between tanh(D_t sum_s D_s): entries that agree with the sum win
    v_t     within * between, clipped from below at its order statistic int((1 - ratio) n), mapped to [0, 1]
    n is the number of entries of the model, or with scope "tensor" of the tensor. The authors take ratio 0.05 to 0.1
    and scale 1.2 or evolve both on validation data. Where the least and the largest value are one, and they are mapped
    to 0 / 0 by the formula, they become 1 if positive and 0 otherwise: a zero task vector takes no part, a constant one
    counts everywhere. An entry that no task has a weight for stays at the base.
    """

    ratio: float = param(0.1, "share of the entries of a task that win", low=0, high=1, open_low=True)
    scope: Scope = param("global", "what is ranked together", choices=("tensor", "global"))
    scale: float = param(1.0, "lambda")

    paper = "arXiv 2410.02396"

    @property
    def survey_scope(self) -> Literal["tensor", "model"]:
        return "model" if self.scope == "global" else "tensor"

    @property
    def rounds(self) -> int:
        return 4  # two digits of the magnitudes' borders, two of the scores'

    def survey(self, group: TaskGroup) -> Any:
        return self._first().survey(group)

    def join(self, one: Any, other: Any) -> Any:
        return self._first().join(one, other)

    def decide(self, answer: Any) -> Combine:
        return self._first().decide(answer)

    def workspace(self, info: TensorInfo) -> int:
        return self._first().workspace(info)

    def _first(self) -> SurveyedCombine:
        from pymerge.methods._pcb_weights import first_question

        return first_question(self.ratio, self.scale)
