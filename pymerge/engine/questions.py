"""Steps that ask something of all entries before any are merged: sweeps over all their tensors come first."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pymerge.engine.ranges import batches, tiles
from pymerge.methods.base import Combine, Purify
from pymerge.methods.surveyed import SurveyedCombine, SurveyedPurify

if TYPE_CHECKING:
    from pymerge.engine.execute import Executor
    from pymerge.engine.lanes import Place
    from pymerge.engine.piece import Piece
    from pymerge.engine.plan import Item
    from pymerge.recipe import Steps


def answered(executor: Executor, steps: Steps, items: Sequence[Item]) -> Combine:
    """What the combine step becomes when it knows the answers for all items. One sweep a question, nothing is kept of
    them: an interrupted merge asks again and gets the same answers."""
    combine = steps.combine
    while isinstance(combine, SurveyedCombine):
        combine = combine.decide(sweep(executor, combine, items) if combine.rounds else None)
    return combine


def sweep(executor: Executor, combine: SurveyedCombine, items: Sequence[Item]) -> Any:
    """The answer for all entries, joined from those of the tiles as they come."""
    from pymerge.engine.generic import survey_pieces

    # Of adapters the factors are asked, so the weight under them need not be read.
    items = [replace(item, entry=replace(item.entry, adds=False)) if item.factored else item for item in items]
    answers: list[Any] = []
    joining = threading.Lock()

    def question(pieces: Sequence[Piece], place: Place | None) -> None:
        found = survey_pieces(executor.plan, pieces, place, executor.steps_of(pieces[0].item), combine)
        with joining:
            answers[:] = [combine.join(answers[0], found) if answers else found]

    ranges = ((item, *tile) for item in items for tile in tiles(item, item.first, item.count))
    for batch in batches(executor.feed.order(ranges)):
        executor.ask(batch, question)
    executor.pipeline.drain()
    return answers[0]


def answered_purify(executor: Executor, step: SurveyedPurify, items: Sequence[Item]) -> Purify:
    """What the purify step becomes when it knows the answers for all matrices, those merged as one taken as one."""
    from pymerge.engine.generic import survey_matrix

    answers: list[Any] = []
    joining = threading.Lock()

    def question(pieces: Sequence[Piece], place: Place | None) -> None:
        found = survey_matrix(executor.plan, pieces, place, step)
        with joining:
            for one in found:
                answers[:] = [step.join(answers[0], one) if answers else one]

    for batch in batches(executor.feed.order((item, item.first, item.count) for item in items if item.count)):
        executor.ask(batch, question)
    executor.pipeline.drain()
    return step.decide(answers[0] if answers else None)
