"""Steps that ask something of all entries before any are merged: sweeps over all their tensors come first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from pymerge.engine.asking import rule_part
from pymerge.engine.ranges import tiles
from pymerge.methods.base import Combine, ElementWiseCombine, Purify, TensorInfo, chain_rule
from pymerge.methods.surveyed import SurveyedCombine, SurveyedPurify
from pymerge.ops.delta_rule import DeltaRule, Survey, resolve

if TYPE_CHECKING:
    from pymerge.engine.execute import Executor
    from pymerge.engine.lanes import Place
    from pymerge.engine.piece import Piece
    from pymerge.engine.plan import Item, Plan
    from pymerge.engine.survey import Tile
    from pymerge.recipe import Steps

R = TypeVar("R")


def answered(steps: Steps, ask: Callable[[SurveyedCombine], Any]) -> Combine:
    """What the combine step becomes when it knows the answers for all items. One sweep a question, nothing is kept of
    them: an interrupted merge asks again and gets the same answers.

    ask   the joined answer of all items"""
    combine = steps.combine
    while isinstance(combine, SurveyedCombine):
        combine = combine.decide(ask(combine) if combine.rounds else None)
    return combine


def model_rule(plan: Plan, steps: Steps, items: Sequence[Item], survey: Survey) -> DeltaRule:
    """The rule of the concatenation of all items, answered."""
    assert isinstance(steps.combine, ElementWiseCombine)
    entries, tasks = sum(item.count for item in items), len(items[0].entry.tuned)
    info = TensorInfo(name="", shape=(entries,), tasks=tasks, seed=plan.recipe.seed)
    return resolve(chain_rule(rule_part(steps)[1], steps.combine, info), survey)


def sweep(executor: Executor, items: Sequence[Item], combine: SurveyedCombine) -> Any:
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
    executor.each(ranges, question)
    return answers[0]


def answered_purify(executor: Executor, step: SurveyedPurify, items: Sequence[Item]) -> Purify:
    """What the purify step becomes when it knows the answers for all matrices."""
    return step.decide(sweep_matrices(executor, items, step))


def sweep_matrices(executor: Executor, items: Sequence[Item], step: SurveyedPurify) -> Any:
    """The joined answer of all matrices, those merged as one taken as one; None where there are none."""
    from pymerge.engine.generic import survey_matrix

    answers: list[Any] = []
    joining = threading.Lock()

    def question(pieces: Sequence[Piece], place: Place | None) -> None:
        found = survey_matrix(executor.plan, pieces, place, step)
        with joining:
            for one in found:
                answers[:] = [step.join(answers[0], one) if answers else one]

    executor.each(((item, item.first, item.count) for item in items if item.count), question)
    return answers[0] if answers else None


def sweep_over(executor: Executor, items: Sequence[Item]) -> Callable[..., list]:
    """A function that runs another over all tiles of the items, reading ahead, and returns its results in order."""
    ranges = [(item, first, count) for item in items for first, count in tiles(item, item.first, item.count)]
    numbers = {(item.entry.name, first): n for n, (item, first, _) in enumerate(ranges)}

    def sweep(function: Callable[[Tile], R], only: Collection[int] | None = None) -> list[R]:
        results: dict[int, R] = {}

        def question(pieces: Sequence[Piece], place: Place | None) -> None:
            for piece in pieces:
                number = numbers[piece.item.entry.name, piece.first]
                tile, _held = executor.tile(replace(piece, number=number))
                results[number] = function(tile)

        asked = (found for n, found in enumerate(ranges) if only is None or n in only)
        executor.each(asked, question, in_memory=True)
        return [results[number] for number in sorted(results)]

    return sweep
