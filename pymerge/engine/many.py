"""Many merges of the same models from disk to disk: the inputs are read once for all of them.

Each output is what a merge alone writes, staged under the same identity: either may continue what the other has begun.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pymerge.checkpoint import StagedOutput, plan_side_files
from pymerge.engine.alignment import with_given
from pymerge.engine.devices import names_of
from pymerge.engine.execute import Stop
from pymerge.engine.local import (
    Inputs,
    identity,
    kept_or_removed,
    merge_to_disk,
    open_inputs,
    planned,
    settled,
    stopped_by_signals,
    write_side_files,
)
from pymerge.engine.parts import with_parts
from pymerge.engine.plan import Options, Plan
from pymerge.engine.process import peak_memory
from pymerge.engine.progress import make_progress
from pymerge.engine.several import SeveralExecutor
from pymerge.engine.side_by_side import Alone, ranges_of, together
from pymerge.engine.summary import summary_of
from pymerge.errors import RecipeError
from pymerge.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One output.

    unscaled  the recipe at scale 1, equal for settings that differ in the scale alone; None: the scale is not varied
    """

    label: str
    recipe: Recipe
    unscaled: Recipe | None
    out: Path


@dataclass(frozen=True, kw_only=True)
class Pass:
    """outputs  how many were made in it
    read        bytes that it read, counted"""

    outputs: int
    seconds: float
    read: int


def why_apart(recipe: Recipe) -> str:
    """Why merges of a recipe with other hyperparameters cannot read their inputs together; "" where they can."""
    if recipe.combine_class.beside:
        return f"{recipe.method} looks at the models again for the {recipe.combine_class.beside} beside the weights"
    if recipe.sequential:
        return f"{recipe.method} observes layers behind those that are merged, which differ"
    return ""


def refuse_devices(options: Options) -> None:
    """What is read once for several merges stays in the memory of the CPU."""
    if names_of(options.device)[0]:
        raise RecipeError(f"device {options.device!r}: merges that read their inputs together are made on the cpu")


@contextmanager
def planned_many(settings: Sequence[Setting], options: Options) -> Iterator[tuple[Inputs, list[Plan]]]:
    """Each setting's plan as a merge of its own, while the inputs are open. Every check that headers allow has been
    made, for all settings; nothing is computed, and no permutations are searched for."""
    recipe, options = settings[0].recipe, replace(options, memory=options.memory_bytes)
    refuse_devices(options)
    with ExitStack() as stack:
        inputs = with_given(recipe, open_inputs(recipe, options, stack))
        plan_side_files(inputs.reference)
        plans = [planned(one.recipe, with_parts(one.recipe, inputs), options) for one in settings]
        for group in [] if why_apart(recipe) else grouped(settings, inputs, plans, options):
            together(group, options)
        yield inputs, plans


def merge_many(
    settings: Sequence[Setting], options: Options | None = None, made: Callable[[Setting, float], None] | None = None
) -> list[Pass]:
    """Merges into each setting's folder what `merge_to_disk` writes there.

    settings  of recipes that differ in hyperparameters alone
    made      called when a folder is complete, with the seconds since its pass began
    Returns   the passes that it took: one, unless hyperparameters change what is read or memory is short
    Raises    as merge_to_disk; Overflow says of which setting
    Cost      one pass over the inputs, and space for all outputs; of settings that differ in the scale alone (where
              `why_merged_anew` has nothing against it) one merge, of the others one each"""
    options = options or Options()
    options, made = replace(options, memory=options.memory_bytes), made or (lambda setting, seconds: None)
    refuse_devices(options)
    if why_apart(settings[0].recipe):
        return [apart(setting, options, made) for setting in settings]
    with ExitStack() as stack:
        inputs, first = settled(settings[0].recipe, open_inputs(settings[0].recipe, options, stack), options)
        plan_side_files(inputs.reference)
        plans = [first, *(planned(one.recipe, with_parts(one.recipe, inputs), options) for one in settings[1:])]
        return [
            in_one_pass([settings[one.number] for one in group], group, inputs, options, made)
            for group in grouped(settings, inputs, plans, options)
        ]


def apart(setting: Setting, options: Options, made: Callable[[Setting, float], None]) -> Pass:
    summary = merge_to_disk(setting.recipe, setting.out, options)
    made(setting, summary["seconds"])
    return Pass(outputs=1, seconds=summary["seconds"], read=summary["bytes_read"])


def grouped(settings: Sequence[Setting], inputs: Inputs, plans: Sequence[Plan], options: Options) -> list[list[Alone]]:
    """Settings that read the same ranges, with as many threads an item, together."""
    groups: dict[object, list[Alone]] = {}
    for number, (setting, plan) in enumerate(zip(settings, plans, strict=True)):
        own = with_parts(setting.recipe, inputs)
        alone = Alone(
            number=number, label=setting.label, unscaled=setting.unscaled, recipe=setting.recipe, inputs=own, plan=plan
        )
        groups.setdefault(ranges_of(plan), []).append(alone)
    return list(groups.values())


def in_one_pass(
    settings: Sequence[Setting],
    group: Sequence[Alone],
    inputs: Inputs,
    options: Options,
    made: Callable[[Setting, float], None],
) -> Pass:
    """Reads the inputs once, writes and commits all outputs of a group."""
    started, stop = time.monotonic(), Stop()
    plan = together(group, options)
    with ExitStack() as stack:
        staged, known = staged_outputs(settings, group, options, stack), len(plan.reading.notes)
        with kept_or_removed(staged):
            tensors = len(plan.reading.layout.slots)
            with make_progress(plan.reading.read_bytes, options.progress, tensors) as progress:
                executor = SeveralExecutor(plan, staged, threads=options.thread_count, progress=progress, stop=stop)
                with stopped_by_signals(stop, executor):
                    executor.run()
            inputs.check_unchanged()
        for setting, alone, output in zip(settings, group, staged, strict=True):
            seconds = time.monotonic() - started
            told = replace(alone.plan, notes=[*alone.plan.notes, *plan.reading.notes[known:]])
            summary = summary_of(
                told, inputs.all, output.checksums(), output.facts(), seconds=seconds, peak=peak_memory()
            )
            output.commit(
                lambda folder, alone=alone, summary=summary: write_side_files(
                    folder, alone.recipe, alone.inputs, executor, summary
                )
            )
            made(setting, seconds)
    return Pass(outputs=len(group), seconds=time.monotonic() - started, read=progress.read)


def staged_outputs(
    settings: Sequence[Setting], group: Sequence[Alone], options: Options, stack: ExitStack
) -> list[StagedOutput]:
    """All outputs, begun or continued. Where one cannot be, those that are empty yet are removed again."""
    staged: list[StagedOutput] = []
    try:
        for setting, alone in zip(settings, group, strict=True):
            same = identity(alone.recipe, alone.inputs, options, alone.plan)
            where = {"overwrite": options.overwrite, "resume": options.resume, "inputs": alone.inputs.all}
            staged.append(stack.enter_context(StagedOutput(setting.out, alone.plan.layout, same, **where)))
    except BaseException:
        for output in staged:
            output.abort(keep=bool(output.done))
        raise
    return staged
