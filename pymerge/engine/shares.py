"""A plan cut into shares that other processes work on, and what they are told of the rest of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pymerge.engine.asking import survey_key
from pymerge.engine.costs import merge_cost
from pymerge.engine.execute import Executor
from pymerge.engine.plan import Item, Plan
from pymerge.engine.rates import Rates
from pymerge.methods.base import Combine, Purify
from pymerge.ops.delta_rule import DeltaRule

LONGEST = 10.0  # estimated seconds of a share of several items: what is lost with the process that works on it
PER_PLACE = 8  # shares for each process at least, so that all end at about the same time


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Of the plan's questions, in the plan's order; None where nothing is left to do with an answer."""

    purify: tuple[Purify | None, ...] = ()
    rules: tuple[DeltaRule, ...] = ()
    combine: tuple[Combine | None, ...] = ()


class Share(Executor):
    """Runs the items of a plan, with the answers to its questions given; or puts one question to them.

    question   gets the executor; then nothing is merged, and `found` is what it returns"""

    def __init__(
        self, *given: Any, answers: Answers, question: Callable[[Executor], Any] | None = None, **how: Any
    ) -> None:
        super().__init__(*given, **how)
        self.question, self.found = question, None
        self.know(answers)

    def know(self, answers: Answers) -> None:
        for (step, _), cleaned in zip(self.plan.purify_questions, answers.purify, strict=False):
            if cleaned is not None:
                self.cleaned[id(step)] = cleaned
        self.answers = list(answers.rules)
        for (steps, _), decided in zip(self.plan.questions, answers.combine, strict=False):
            if decided is not None:
                self.decided[survey_key(steps)] = decided

    def ask(self) -> None:
        if self.question is not None:
            self.found = self.question(self)

    def todo(self) -> Iterator[tuple[Item, int, int]]:
        return super().todo() if self.question is None else iter(())


def looks(item: Item) -> int:
    """How often the process that merges an item reads it."""
    return 1 + (item.rule_reads if item.mode == "swept" else 0)


def merge_seconds(item: Item, threads: int, rates: Rates) -> float:
    """Estimate for one process; only ratios matter."""
    cost = merge_cost(item)
    return max(cost.read * looks(item) / rates.disk, cost.written / rates.write, cost.seconds(rates) / threads)


def question_seconds(item: Item, threads: int, rates: Rates) -> float:
    """Likewise, for one look at the item."""
    entries = item.count * len(item.inputs)
    return max(item.read_bytes / rates.disk, entries * rates.kernels["histogram"] / threads)


def cut(items: Sequence[Item], seconds: Callable[[Item], float], places: int, *, joins: bool = True) -> list[list[int]]:
    """Numbers of the items of each share, in order, neighbours together as far as the work allows, for `places`
    processes. An item is never cut.

    joins   matrices that are merged as one stay together"""
    together: dict[tuple[str, int], list[int]] = {}
    for number, item in enumerate(items):
        join = item.entry.join if joins else None
        together.setdefault(("item", number) if join is None else ("join", join[0]), []).append(number)
    costs = {key: sum(seconds(items[n]) for n in group) for key, group in together.items()}
    most = min(LONGEST, sum(costs.values()) / (PER_PLACE * max(1, places)))  # 0: all nodes are lost just now
    shares: list[list[int]] = []
    filled = 0.0
    for key, group in together.items():
        if not shares or filled + costs[key] > most:
            shares.append([])
            filled = 0.0
        shares[-1] += group
        filled += costs[key]
    return shares


def digest_of(plan: Plan) -> str:
    """Equal for plans that are cut alike, so that numbers of items mean the same."""
    digest = hashlib.blake2b(digest_size=16)
    groups = [plan.items, *(items for _, items in (*plan.purify_questions, *plan.surveys, *plan.questions))]
    for items in groups:
        for item in items:
            cut = (item.entry.name, item.mode, item.first, item.count, item.tile, item.survey_scope, item.factored)
            digest.update(repr(cut).encode())
        digest.update(b"|")
    return digest.hexdigest()
