"""Combine steps that ask something of all entries before they merge any: sweeps over all their tensors come first."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pymerge.methods.base import Combine
from pymerge.methods.surveyed import SurveyedCombine

if TYPE_CHECKING:
    from pymerge.engine.arena import Block
    from pymerge.engine.execute import Executor, Piece
    from pymerge.engine.plan import Item
    from pymerge.recipe import Steps


def answered(executor: Executor, steps: Steps, items: Sequence[Item]) -> Combine:
    """What the combine step becomes when it knows the answers for all items. One sweep a question, nothing is kept of
    them: an interrupted merge asks again and gets the same answers."""
    combine = steps.combine
    while isinstance(combine, SurveyedCombine):
        combine = combine.decide(sweep(executor, steps, combine, items) if combine.rounds else None)
    return combine


def sweep(executor: Executor, steps: Steps, combine: SurveyedCombine, items: Sequence[Item]) -> Any:
    """The answer for all entries, joined from those of the tiles as they come."""
    from pymerge.engine.generic import survey_pieces

    answers: list[Any] = []
    joining = threading.Lock()

    def work(block: Block, pieces: Sequence[Piece]) -> None:
        found = survey_pieces(executor.plan, pieces, executor.device, steps, combine)
        block.release()
        with joining:
            answers[:] = [combine.join(answers[0], found) if answers else found]

    for batch in executor.batches(items):
        executor.pipeline.submit(partial(work, *executor.load(batch)))
    executor.pipeline.drain()
    return answers[0]
