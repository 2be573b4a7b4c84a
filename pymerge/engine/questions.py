"""Steps that ask something of all entries before any are merged: sweeps over all their tensors come first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from pymerge.engine.ranges import tiles
from pymerge.methods.base import Combine, Purify
from pymerge.methods.surveyed import SurveyedCombine, SurveyedPurify

if TYPE_CHECKING:
    from pymerge.engine.execute import Executor, Piece
    from pymerge.engine.plan import Item
    from pymerge.engine.survey import Tile
    from pymerge.recipe import Steps

R = TypeVar("R")


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

    def look(pieces: Sequence[Piece]) -> None:
        steps = executor.steps_of(pieces[0].item)
        found = survey_pieces(executor.plan, pieces, executor.device, steps, combine)
        with joining:
            answers[:] = [combine.join(answers[0], found) if answers else found]

    executor.each(((item, *tile) for item in items for tile in tiles(item, item.first, item.count)), look)
    return answers[0]


def answered_purify(executor: Executor, step: SurveyedPurify, items: Sequence[Item]) -> Purify:
    """What the purify step becomes when it knows the answers for all matrices, those merged as one taken as one."""
    from pymerge.engine.generic import survey_matrix

    answers: list[Any] = []
    joining = threading.Lock()

    def look(pieces: Sequence[Piece]) -> None:
        found = survey_matrix(executor.plan, pieces, executor.device, step)
        with joining:
            for one in found:
                answers[:] = [step.join(answers[0], one) if answers else one]

    executor.each(((item, item.first, item.count) for item in items if item.count), look)
    return step.decide(answers[0] if answers else None)


def sweep_over(executor: Executor, items: Sequence[Item]) -> Callable[..., list]:
    """A function that runs another over all tiles of the items, reading ahead, and returns its results in order."""
    ranges = [(item, first, count) for item in items for first, count in tiles(item, item.first, item.count)]
    numbers = {(item.entry.name, first): n for n, (item, first, _) in enumerate(ranges)}

    def sweep(function: Callable[[Tile], R], only: Collection[int] | None = None) -> list[R]:
        results: dict[int, R] = {}

        def look(pieces: Sequence[Piece]) -> None:
            for piece in pieces:
                number = numbers[piece.item.entry.name, piece.first]
                tile, _held = executor.tile(replace(piece, number=number))
                results[number] = function(tile)

        executor.each((found for n, found in enumerate(ranges) if only is None or n in only), look)
        return [results[number] for number in sorted(results)]

    return sweep
