"""Combine steps that must look at all entries that belong together before they merge any of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal

from pymerge.methods.base import Combine, TaskGroup

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
        import torch

        merged = torch.zeros_like(group.tuned[0], dtype=torch.float32, memory_format=torch.contiguous_format)
        if merged.numel() == 0:
            return merged
        step: Combine = self
        while isinstance(step, SurveyedCombine):
            answer = None
            for block in blocks(group) if step.rounds else ():
                found = step.survey(block)
                answer = found if answer is None else step.join(answer, found)
            step = step.decide(answer)
        for block, place in zip(blocks(group), merged.view(-1).split(BLOCK), strict=True):
            place.copy_(step.combine(block))
        return merged


BLOCK = 64 * SUM_BLOCK  # entries that `combine` looks at together


def blocks(group: TaskGroup) -> Iterator[TaskGroup]:
    """The group's entries in order, BLOCK at a time, as one-dimensional tensors."""
    flat = {
        "base": () if group.base is None else (group.base,),
        "tuned": group.tuned,
        "weights": group.weights or (),
    }
    parts = {key: [t.reshape(-1).split(BLOCK) for t in tensors] for key, tensors in flat.items()}
    for i in range(len(parts["tuned"][0])):
        base, tuned, weights = (tuple(part[i] for part in parts[key]) for key in flat)
        yield replace(
            group,
            base=base[0] if base else None,
            tuned=tuned,
            weights=weights or None,
            first=group.first + i * BLOCK,
        )
