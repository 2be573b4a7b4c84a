"""Combine steps that must look at all entries that belong together before they merge any of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

from pymerge.methods.base import Combine, Purify, TaskGroup

if TYPE_CHECKING:
    from torch import Tensor

SUM_BLOCK: Final = 1 << 14  # blocks of a survey start at multiples of this many entries of a parameter


class SurveyedCombine(Combine):
    """A combine step with a question to all entries of a tensor, or of the model.

    `survey` answers it for a block of entries, `join` puts the answers of two blocks together, `decide` gives the step
    that goes on with the answer: one that merges blocks of entries, or another one with a question. Answers must not
    depend on the blocks: integer counts, or sums of blocks of SUM_BLOCK entries that are added exactly. Calls come from
    several threads; joins come one at a time, in any order.
    """

    @property
    def survey_scope(self) -> Literal["tensor", "model"]:
        """Which entries belong together: those of a tensor, then `combine` sees it as a whole; or those of all tensors
        with this step, then the engine asks and merges with what is decided."""
        return "model"

    @property
    def unit(self) -> Literal["tensor", "entries"]:  # type: ignore[override]
        return "entries" if self.survey_scope == "model" else "tensor"

    @property
    def rounds(self) -> int:
        """How often all entries are looked at before the merge; 0: there is no question, `decide` gets None."""
        return 1

    def survey(self, group: TaskGroup) -> Any:
        """The answer for a block."""
        raise NotImplementedError

    def join(self, one: Any, other: Any) -> Any:
        """The answer for the entries of both; may change and return `one`."""
        raise NotImplementedError

    def decide(self, answer: Any) -> Combine:
        """The step that knows the answer for all entries."""
        raise NotImplementedError

    def combine(self, group: TaskGroup) -> Tensor:
        """As if the group's entries were all there are."""
        step: Combine = self
        while isinstance(step, SurveyedCombine):
            if group.tuned[0].numel() == 0:
                return group.tuned[0].float()
            step = step.decide(step.survey(group) if step.rounds else None)
        return step.combine(group)


class SurveyedPurify(Purify):
    """A purify step with a question to all matrices of the model that it acts on, one at a time, as they are stored.

    `survey` answers it for a matrix, `join` puts two answers together (calls come one at a time, in any order),
    `decide` gives the step that goes on. `purify` of a step that still asks answers from its group alone. Such a step
    is the first purify step.
    """

    whole_weights = True

    @property
    def asks(self) -> bool:
        """Whether there is a question."""
        raise NotImplementedError

    def survey(self, group: TaskGroup) -> Any:
        raise NotImplementedError

    def join(self, one: Any, other: Any) -> Any:
        raise NotImplementedError

    def decide(self, answer: Any) -> Purify:
        raise NotImplementedError
