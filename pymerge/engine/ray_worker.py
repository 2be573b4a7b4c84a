"""What a Ray worker does for a merge: opens the inputs and plans for itself, once, then works on shares of the plan."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge import hub
from pymerge.checkpoint.journal import Segment, differences, normal_form
from pymerge.checkpoint.shared import SharedOutput
from pymerge.engine.alignment import aligned, with_given
from pymerge.engine.execute import Executor, Stop
from pymerge.engine.local import identity, open_inputs, planned, stopped_by_signals
from pymerge.engine.parts import with_parts
from pymerge.engine.plan import Item, Options, Plan
from pymerge.engine.progress import NoProgress
from pymerge.engine.questions import sweep, sweep_matrices
from pymerge.engine.shares import Answers, Share, digest_of
from pymerge.errors import Interrupted, MergeError
from pymerge.recipe import Recipe

if TYPE_CHECKING:
    from pymerge.align import Clusters, Permutations

Done = Mapping[str, Sequence[tuple[int, int, int]]]  # tensor -> (start, bytes, checksum) of what is written


@dataclass(frozen=True, kw_only=True)
class Job:
    """A merge as its workers are told of it: small, whatever the models are.

    recipe    pickled: its names and URLs are looked up where it is unpickled, from `folder`; download: also on the Hub
    units     the permutations that were found for it
    folder    in which the paths of the recipe are meant
    identity  of the staged output; plan: digest of the plan's cuts
    number    differs from that of every other run"""

    recipe: bytes
    download: bool
    options: Options
    units: Permutations | Clusters | None
    folder: str
    staging: Path
    identity: Mapping[str, Any]
    plan: str
    number: str


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A job, as far as it is the same for all its shares."""

    job: Job
    plan: Plan
    output: SharedOutput
    stack: ExitStack

    def executor(self, items: Sequence[Item], stop: Stop, **how: Any) -> Share:
        options = self.job.options
        return Share(
            replace(self.plan, items=tuple(items)),
            self.output,
            threads=options.thread_count,
            progress=NoProgress(),
            stop=stop,
            **how,
        )


@dataclass(frozen=True)
class Failure:
    """An error that a user can cause, with the failed system call behind it."""

    error: MergeError
    cause: OSError | None


_opened: Opened | None = None  # of this process


def merge_share(job: Job, answers: Answers, numbers: Sequence[int], done: Done) -> Sequence[Segment] | Failure:
    """Merges items of the plan; what is on disk then. Ends early, with what it has, when the task is cancelled."""

    def merged(opened: Opened) -> Sequence[Segment]:
        opened.output.done = {name: list(parts) for name, parts in done.items()}
        stop = Stop()
        executor = opened.executor([opened.plan.items[n] for n in numbers], stop, answers=answers)
        try:
            with stopped_by_signals(stop, executor):
                executor.run()
        except Interrupted:
            pass
        return opened.output.finish()

    return reported(job, merged)


def ask_share(job: Job, answers: Answers, kind: str, number: int, numbers: Sequence[int], *asked: Any) -> Any:
    """The answer of some items to one of the plan's questions, to be joined with those of the others.

    kind    of the question: purify, rules or combine; number: which of that kind; numbers: which of its items
    asked   rules: the method of the survey, and its arguments; else the step that asks"""

    def answered(opened: Opened) -> Any:
        covered = {
            "purify": opened.plan.purify_questions,
            "rules": opened.plan.surveys,
            "combine": opened.plan.questions,
        }[kind][number][1]
        items = [covered[n] for n in numbers]

        def question(executor: Executor) -> Any:
            if kind == "rules":
                survey = executor.survey(items)
                return getattr(survey, asked[0])(*asked[1:])
            return {"purify": sweep_matrices, "combine": sweep}[kind](executor, items, asked[0])

        opened.output.done = {}
        executor = opened.executor(items, Stop(), answers=answers, question=question)
        executor.run()
        return executor.found

    return reported(job, answered)


def reported(job: Job, work: Callable[[Opened], Any]) -> Any:
    """What the work returns, or what a user must be told."""
    global _opened
    try:
        if _opened is None or _opened.job.number != job.number:
            if _opened is not None:
                _opened.stack.close()
                _opened = None
            _opened = opened_job(job)
        return work(_opened)
    except MergeError as error:
        if _opened is not None:  # its files would be held while this process waits for other work
            _opened.stack.close()
            _opened = None
        return Failure(error, error.__cause__ if isinstance(error.__cause__, OSError) else None)


def opened_job(job: Job) -> Opened:
    """Raises a MergeError that names this machine where it does not see what the driver saw."""
    with contextlib.suppress(OSError):  # paths that are not found from here are errors of their own
        os.chdir(job.folder)
    with ExitStack() as stack:
        try:
            with hub.access(download=job.download):
                recipe: Recipe = pickle.loads(job.recipe)
            inputs = with_parts(recipe, with_given(recipe, open_inputs(recipe, job.options, stack)))
            if job.units is not None and inputs.alignment is None:
                inputs = aligned(recipe, inputs, job.units)
            plan = planned(recipe, inputs, job.options)
        except MergeError as error:
            raise type(error)(f"on {socket.gethostname()}: {error}") from error.__cause__
        found = normal_form({**identity(recipe, inputs, job.options, plan), "layout": plan.layout.digest()})
        changes = differences({**job.identity, "plan": job.plan}, {**found, "plan": digest_of(plan)})
        if changes:
            raise MergeError(
                f"{socket.gethostname()} sees another merge than the one that was started: {'; '.join(changes[:10])}. "
                "All machines must see the same files and have the same pymerge"
            )
        output = SharedOutput(job.staging, plan.layout, job.identity)
        stack.callback(output.close)
        return Opened(job=job, plan=plan, output=output, stack=stack.pop_all())
