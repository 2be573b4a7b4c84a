"""A merge on a Ray cluster: this process plans, stages, keeps the journal and commits; workers merge.

Workers read the inputs and write the output themselves, on a file system that all machines share. Through Ray go the
recipe, numbers of items, answers to questions, and checksums of what was written.
"""

from __future__ import annotations

import os
import pickle
import uuid
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from itertools import chain
from operator import add
from pathlib import Path
from typing import Any

from pymerge import hub
from pymerge.checkpoint import StagedOutput
from pymerge.checkpoint.journal import Segment
from pymerge.engine.execute import Stop
from pymerge.engine.local import (
    Extras,
    Inputs,
    kept_or_removed,
    merge_to_disk,
    stopped_by_signals,
)
from pymerge.engine.plan import Item, Options, Plan
from pymerge.engine.process import resident_memory
from pymerge.engine.progress import make_progress
from pymerge.engine.questions import answered, model_rule
from pymerge.engine.rates import known_rates
from pymerge.engine.ray_cluster import RETRIES, Cluster, connected, processors
from pymerge.engine.ray_worker import Job, ask_share, merge_share
from pymerge.engine.shares import Answers, Share, cut, digest_of, looks, merge_seconds, question_seconds
from pymerge.engine.survey import SweptSurvey
from pymerge.errors import ClusterError, RecipeError
from pymerge.methods.surveyed import SurveyedCombine, SurveyedPurify
from pymerge.ops.delta_rule import DeltaRule
from pymerge.recipe import ModelRef, Recipe


def merge_on_ray(
    recipe: Recipe,
    out: str | Path,
    options: Options | None = None,
    extras: Extras | None = None,
    *,
    address: str | None = None,
) -> dict[str, Any]:
    """As `engine.local.merge_to_disk`, on a Ray cluster, with the same bytes.

    options   memory and threads are those of one worker process; threads by default: the processors of the smallest
              node
    address   of the cluster, see `engine.ray_cluster.connected`
    Raises    as merge_to_disk; RecipeError for what goes in one process only, and without Ray; ClusterError

    Cost      inputs are opened and planned once a worker process; a call takes some milliseconds"""
    options = options or Options()
    refuse_what_cannot_be_shared(recipe, options)
    with connected(address):
        options = replace(options, memory=options.memory_bytes, threads=options.threads or processors())
        cluster = Cluster(needed(options))
        cluster.check()
        return merge_to_disk(recipe, out, options, extras, partial(run_on, cluster))


def refuse_what_cannot_be_shared(recipe: Recipe, options: Options) -> None:
    def sources(model: ModelRef) -> list[ModelRef]:
        return [found for found in (model, model.fisher, model.statistics) if found is not None]

    models = [*recipe.models, *([recipe.base] if recipe.base is not None else [])]
    for found in (source for model in models for source in sources(model)):
        if found.in_memory:
            raise RecipeError(f"{found.path} is in memory: with the engine ray workers read files that all of them see")
    if any(model.data is not None for model in models):
        raise RecipeError(
            "data: models that are observed while they are merged run in one process: use the engine local, or "
            "`pymerge observe` first and `statistics` in place of data"
        )
    if options.device not in ("cpu", "cuda"):
        raise RecipeError(f"device {options.device!r}: with the engine ray cpu or cuda; Ray says which GPU")


def needed(options: Options) -> dict[str, float]:
    """What a worker takes of a node. memory: the budget, and what a process holds anyhow."""
    need: dict[str, float] = {"CPU": options.thread_count, "memory": options.memory_bytes + resident_memory()}
    return need | ({"GPU": 1} if options.device != "cpu" else {})


def run_on(cluster: Cluster, plan: Plan, inputs: Inputs, staged: StagedOutput, options: Options) -> Share:
    """Works through a plan on the cluster; what is done is kept or removed as in a local merge."""
    stop = Stop()
    with kept_or_removed([staged]):
        with make_progress(plan.read_bytes, options.progress, len(plan.layout.slots)) as progress:
            executor = Share(plan, staged, answers=Answers(), threads=1, progress=progress, stop=stop)
            executor.lanes = None  # the devices are the workers'
            with stopped_by_signals(stop, executor):
                run = Run(cluster, cluster.put(job_of(plan, inputs, staged, options)), executor, options.thread_count)
                run.ask()
                run.merge()
        inputs.check_unchanged()
        return executor


def job_of(plan: Plan, inputs: Inputs, staged: StagedOutput, options: Options) -> Job:
    budgets = [device.budget for device in plan.devices]  # not what is free on each worker's: all plan alike
    return Job(
        recipe=pickle.dumps(plan.recipe),
        download=hub.downloads(),
        options=replace(options, device_memory=min(budgets)) if budgets else options,
        units=inputs.alignment.units if inputs.alignment is not None else None,
        folder=os.getcwd(),
        staging=staged.staging,
        identity=staged.identity,
        plan=digest_of(plan),
        number=uuid.uuid4().hex,
    )


class Run:
    """The calls of one merge."""

    def __init__(self, cluster: Cluster, job: Any, executor: Share, threads: int) -> None:
        self.cluster, self.job, self.executor, self.threads = cluster, job, executor, threads
        self.answers, self.rates = Answers(), known_rates()

    def merge(self) -> None:
        """Everything that is not done yet. A worker that is told to stop returns what it has; the rest goes round
        again."""
        for rounds in range(2 + RETRIES):
            self.executor.look_at_sink()
            left = {id(item) for item, _, _ in self.executor.todo()}
            if not left:
                return
            if rounds > RETRIES:
                break
            self.merge_items([n for n, item in enumerate(self.executor.plan.items) if id(item) in left])
        raise ClusterError(
            "workers are stopped again and again; what is finished is kept: the same command continues it"
        )

    def merge_items(self, numbers: Sequence[int]) -> None:
        plan, staged = self.executor.plan, self.executor.sink
        assert isinstance(staged, StagedOutput)
        items = [plan.items[n] for n in numbers]
        cost = partial(merge_seconds, threads=self.threads, rates=self.rates)
        shares = cut(items, cost, self.cluster.places)
        shares.sort(key=lambda share: -sum(cost(items[n]) for n in share))  # the longest end last if they begin last
        done, answers = staged.done, self.cluster.put(self.answers)
        calls = [
            (self.job, answers, [numbers[n] for n in share], done_of([items[n] for n in share], done))
            for share in shares
        ]

        def take(number: int, segments: Sequence[Segment]) -> None:
            staged.adopt(segments)
            for item in (items[n] for n in shares[number]):
                self.executor.progress.advance(item.read_bytes * looks(item), item.entry.name)

        self.cluster.run(merge_share, calls, take, self.executor.check_stop)

    def ask(self) -> None:
        """Answers the plan's questions of which something is left to do."""
        plan, executor = self.executor.plan, self.executor
        for number, (step, items) in enumerate(plan.purify_questions):
            cleaned = step.decide(self.joined("purify", number, items, step)) if executor.needed(items) else None
            self.know(purify=(*self.answers.purify, cleaned))
        for number, (steps, items) in enumerate(plan.surveys if executor.left(plan.items) else ()):
            survey = SurveyOnNodes(self, number, items)
            self.know(rules=(*self.answers.rules, model_rule(plan, steps, items, survey)))
        for number, (steps, items) in enumerate(plan.questions):
            ask = partial(self.joined, "combine", number, items)
            self.know(combine=(*self.answers.combine, answered(steps, ask) if executor.left(items) else None))

    def know(self, **more: Any) -> None:
        self.answers = replace(self.answers, **more)
        self.executor.know(self.answers)

    def joined(self, kind: str, number: int, items: Sequence[Item], step: SurveyedCombine | SurveyedPurify) -> Any:
        """The answer of all items to a step's question; None where there are none."""
        shares = self.cut(items)
        answers = self.asked(kind, number, items, shares, [(step,)] * len(shares))
        return reduce(step.join, answers) if answers else None

    def cut(self, items: Sequence[Item], *, joins: bool = True) -> list[list[int]]:
        cost = partial(question_seconds, threads=self.threads, rates=self.rates)
        return cut(items, cost, self.cluster.places, joins=joins)

    def asked(
        self, kind: str, number: int, items: Sequence[Item], shares: Sequence[Sequence[int]], asked: Sequence[Any]
    ) -> list[Any]:
        """The answers of the shares of the items, in order. asked: of each, see ask_share."""
        found: dict[int, Any] = {}

        def take(n: int, answer: Any) -> None:
            found[n] = answer
            for item in (items[i] for i in shares[n]):
                self.executor.progress.advance(item.read_bytes, item.entry.name)

        answers = self.cluster.put(self.answers)
        calls = [(self.job, answers, kind, number, share, *more) for share, more in zip(shares, asked, strict=True)]
        self.cluster.run(ask_share, calls, take, self.executor.check_stop)
        return [found[n] for n in sorted(found) if found[n] is not None]


class SurveyOnNodes(SweptSurvey):
    """A survey of the whole model, each question put to shares of the items. (A model has no rows to rank by.)"""

    def __init__(self, run: Run, number: int, items: Sequence[Item]) -> None:
        self.run, self.number, self.items, self.tasks = run, number, items, len(items[0].entry.tuned)
        self.shares = run.cut(items, joins=False)

    def ask(self, name: str, asked: Sequence[Sequence[Any]]) -> list[Any]:
        """The answers of the shares. asked: the arguments of the method `name` for each."""
        return self.run.asked("rules", self.number, self.items, self.shares, [(name, *more) for more in asked])

    def ask_all(self, name: str, *asked: Any) -> list[Any]:
        return self.ask(name, [asked] * len(self.shares))

    def histogram(self, rule: DeltaRule, prefix: list[int] | None) -> array[int]:
        counts = self.ask_all("histogram", rule, prefix)
        return reduce(lambda one, other: array("q", map(add, one, other)), counts)

    def count_ties(self, theta: array[float], rule: DeltaRule) -> list[Sequence[int]]:
        return list(chain.from_iterable(self.ask_all("count_ties", theta, rule)))

    def find_ties(
        self, theta: array[float], wanted: Mapping[int, Sequence[tuple[int, int]]], rule: DeltaRule
    ) -> list[tuple[int, int]]:
        asked, first = [], 0
        for share in self.shares:  # which numbers its tiles from 0
            count = sum(-(-self.items[n].count // self.items[n].tile) for n in share)
            asked.append((theta, {n - first: ties for n, ties in wanted.items() if first <= n < first + count}, rule))
            first += count
        return list(chain.from_iterable(self.ask("find_ties", asked)))

    def l1_parts(self, rule: DeltaRule) -> list[bytes]:
        return list(chain.from_iterable(self.ask_all("l1_parts", rule)))

    def gram_parts(self) -> list[bytes]:
        return list(chain.from_iterable(self.ask_all("gram_parts")))

    def signs(self, rule: DeltaRule) -> int:
        return sum(self.ask_all("signs", rule))


def done_of(items: Sequence[Item], done: Mapping[str, Sequence[tuple[int, int, int]]]) -> dict[str, list[Any]]:
    """What is written already of these items."""
    found: dict[str, list[Any]] = {}
    for item in items:
        first, width = item.first * item.out_width, item.out_width
        parts = [part for part in done.get(item.entry.name, ()) if first <= part[0] < first + item.count * width]
        if parts:
            found.setdefault(item.entry.name, []).extend(parts)
    return found
