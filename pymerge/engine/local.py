"""A merge from disk to disk in this process: check, plan, stage, run, commit."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint import Checkpoint, StagedOutput, check_output_path, open_checkpoint, safe_name
from pymerge.checkpoint.card import write_card
from pymerge.checkpoint.lora import base_of_adapter, is_adapter, open_adapter
from pymerge.checkpoint.sidefiles import TOKENIZER, copy_side_files, plan_side_files
from pymerge.engine.alignment import Alignment, with_found, with_given
from pymerge.engine.beside import check_beside, write_beside
from pymerge.engine.check import Entry
from pymerge.engine.components import check_components
from pymerge.engine.devices import HOST, names_of, placement
from pymerge.engine.execute import Executor, Stop
from pymerge.engine.inputs import live_statistics, opened_statistics
from pymerge.engine.layouts import with_layouts
from pymerge.engine.network import network_notes
from pymerge.engine.parts import Parts, with_parts
from pymerge.engine.plan import Options, Plan, make_plan
from pymerge.engine.process import peak_memory
from pymerge.engine.progress import make_progress
from pymerge.engine.summary import packages_of, summary_of
from pymerge.engine.vocabulary import with_vocabulary
from pymerge.errors import ClusterError, DeviceMemoryError, InputError, Interrupted, MergeError
from pymerge.recipe import ModelRef, Recipe
from pymerge.recipe.references import split_adapter
from pymerge.remote.blocks import BLOCKS
from pymerge.version import __version__

if TYPE_CHECKING:
    from pymerge.statistics import Statistics
    from pymerge.vocabulary.build import NewVocabulary

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The opened models of a recipe."""

    base: Checkpoint | None
    models: tuple[Checkpoint, ...]
    labels: tuple[str, ...]
    fisher: tuple[Checkpoint, ...] = ()  # of each model, where the method has it
    statistics: tuple[Statistics, ...] = ()  # likewise
    alignment: Alignment | None = None  # by which base, models and fisher are read
    vocabulary: NewVocabulary | None = None  # in whose order base and models have their rows
    parts: Parts | None = None  # of a recipe of slices or modules; then `models` are all models of all parts
    config_changes: Mapping[str, Any] = field(default_factory=dict)  # of the output's config.json, see copy_side_files

    @property
    def all(self) -> tuple[Checkpoint, ...]:
        models = tuple(model for model in self.models if model is not self.base)
        observed = tuple(found.file for found in self.statistics if found.file is not None)
        return ((self.base,) if self.base is not None else ()) + models + self.fisher + observed

    def check_unchanged(self) -> None:
        for checkpoint in self.all:
            checkpoint.check_unchanged()

    @property
    def notes(self) -> list[str]:
        """How what is merged differs from what the models' files hold."""
        named = ((("base", self.base),) if self.base is not None else ()) + tuple(
            (label, model) for label, model in zip(self.labels, self.models, strict=True) if model is not self.base
        )
        return [f"{label}: {note}" for label, model in named for note in model.notes]

    @property
    def reference(self) -> Checkpoint:
        """Gives the output its names, order, side files."""
        return self.all[0]


Run = Callable[[Plan, Inputs, StagedOutput, Options], Executor]


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What the output folder gets beside the weights, where that is other than usual.

    summary    goes into merge.json
    files      texts, by file name
    card       write README.md
    tokenizer  copy the tokenizer's files
    """

    summary: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    card: bool = True
    tokenizer: bool = True


def open_inputs(recipe: Recipe, options: Options, stack: ExitStack) -> Inputs:
    known: dict[str, Checkpoint] = {}  # a base may be one of the models too, and that of several adapters

    def opened(model: ModelRef) -> Checkpoint:
        if not model.in_memory:
            return opened_path(model.local)
        if model.path not in known:
            known[model.path] = open_checkpoint(state_of(model.value))
        return known[model.path]

    def opened_path(path: str) -> Checkpoint:
        key = os.path.realpath(path)
        if key not in known:
            found = adapted(path)
            if found is None:
                found = open_checkpoint(path, allow_pickle=options.allow_pickle, prefer=options.prefer)
            known[key] = found
            stack.callback(found.close)
        return known[key]

    def adapted(path: str) -> Checkpoint | None:
        """`base+adapter`, or an adapter alone: over the recipe's base, or the one that it names."""
        base, adapter = split_adapter(path) or (None, path)
        if not is_adapter(adapter):
            return None
        if base is None and recipe.base is not None and recipe.base.local != path:
            base = recipe.base.local
        base = base if base is not None else base_of_adapter(adapter)
        return open_adapter(adapter, opened_path(base), allow_pickle=options.allow_pickle)

    def observed(model: ModelRef) -> Iterator[Statistics]:
        if model.data is not None:
            yield live_statistics(model, opened(model), sequential=recipe.sequential)
        if (reference := model.statistics) is not None:
            found = opened_statistics(reference, model)
            if not reference.in_memory:
                stack.callback(found.close)
            yield found

    inputs = Inputs(
        base=opened(recipe.base) if recipe.base is not None else None,
        models=tuple(opened(model) for model in recipe.models),
        labels=tuple(model.path for model in recipe.models),
        fisher=tuple(opened(model.fisher) for model in recipe.models if model.fisher is not None),
        statistics=tuple(seen for model in recipe.models for seen in observed(model)),
    )
    return with_vocabulary(recipe, with_layouts(inputs))


def state_of(model: Any) -> Mapping[str, Any]:
    """The tensors of a state dict or of a module."""
    return model if isinstance(model, Mapping) else model.state_dict()


def plan_merge(recipe: Recipe, options: Options | None = None) -> Plan:
    """What `merge` would do: every check that headers allow, nothing computed."""
    with opened_plan(recipe, options or Options()) as (_, plan):
        return plan


@contextmanager
def opened_plan(recipe: Recipe, options: Options) -> Iterator[tuple[Inputs, Plan]]:
    """The plan, while its inputs are open."""
    names_of(options.device)  # refuses a device that is not here before anything is opened
    with ExitStack() as stack:
        inputs = with_parts(recipe, with_given(recipe, open_inputs(recipe, options, stack)))
        yield inputs, planned(recipe, inputs, options)


def planned(
    recipe: Recipe,
    inputs: Inputs,
    options: Options,
    change: Callable[[Sequence[Entry]], Sequence[Entry]] | None = None,
) -> Plan:
    models, beside = (inputs.models, inputs.labels), (inputs.fisher, inputs.statistics)
    check_components(recipe, inputs.base, *models)
    plan = check_beside(make_plan(recipe, inputs.base, *models, options, *beside, change, inputs.parts))
    plan = replace(plan, notes=[*plan.notes, *inputs.notes, *network_notes(inputs.all)])
    if inputs.vocabulary is not None:
        vocabulary = inputs.vocabulary
        plan = replace(plan, notes=[*vocabulary.notes, *plan.notes], vocabulary=vocabulary.summary)
    if inputs.alignment is None:
        return plan
    return replace(plan, notes=[*plan.notes, *inputs.alignment.notes], alignment=inputs.alignment.summary())


def settled(recipe: Recipe, inputs: Inputs, options: Options) -> tuple[Inputs, Plan]:
    """The inputs with their units in one order, and the plan. What headers tell is checked before permutations are
    searched for."""
    inputs = with_parts(recipe, with_given(recipe, inputs))
    plan = planned(recipe, inputs, options)
    if recipe.align is not None and inputs.alignment is None:
        inputs = with_found(recipe, inputs, options)
        plan = planned(recipe, inputs, options)
    return inputs, plan


def merge_to_disk(
    recipe: Recipe,
    out: str | Path,
    options: Options | None = None,
    extras: Extras | None = None,
    run: Run | None = None,
) -> dict[str, Any]:
    """Merges into the folder `out`, which appears complete or not at all. Returns the summary written to merge.json.

    run      what works through the plan, in place of this process

    Raises a MergeError: before anything is computed for what headers and recipe tell; Interrupted after a signal, when
    the same call resumes."""
    options, out, started = options or Options(), Path(out), time.monotonic()
    names_of(options.device)  # refuses a device that is not here before anything is opened
    with ExitStack() as stack:
        inputs = open_inputs(recipe, options, stack)
        check_output_path(out, inputs.all, overwrite=options.overwrite)
        plan_side_files(inputs.reference)  # refuses now what could not be copied at the end
        inputs, plan = settled(recipe, inputs, options)

        def side_files(folder: Path, executor: Executor, summary: dict[str, Any]) -> None:
            write_side_files(folder, recipe, inputs, executor, summary, extras)

        same = identity(recipe, inputs, options, plan)
        return write_folder(out, plan, inputs, options, same, side_files, started=started, run=run)


def write_folder(
    out: Path,
    plan: Plan,
    inputs: Inputs,
    options: Options,
    same: dict[str, Any],
    side_files: Callable[[Path, Executor, dict[str, Any]], None],
    *,
    started: float,
    run: Run | None = None,
) -> dict[str, Any]:
    """Runs a plan into a folder. Returns the summary, as `side_files`, which gets the staging folder, leaves it.

    same     what must be equal for an interrupted run to be continued
    started  on time.monotonic's clock"""
    staged = StagedOutput(out, plan.layout, same, overwrite=options.overwrite, resume=options.resume, inputs=inputs.all)
    with staged:  # whatever fails from here on lets go of the staging folder
        executor = (run or run_staged)(plan, inputs, staged, options)
        seconds = time.monotonic() - started
        checksums, facts, busy = staged.checksums(), staged.facts(), executor.pipeline.busy_seconds
        summary = summary_of(plan, inputs.all, checksums, facts, seconds=seconds, peak=peak_memory(), busy=busy)
        if executor.lanes is not None:
            summary["devices"] = executor.lanes.summary()
        staged.commit(lambda folder: side_files(folder, executor, summary))
    log.info("%s: complete after %.1f s", safe_name(str(out)), time.monotonic() - started)
    return summary


def identity(recipe: Recipe, inputs: Inputs, options: Options, plan: Plan) -> dict[str, Any]:
    """What must be the same for a resumed merge to give the bytes of an uninterrupted one."""
    return {
        "pymerge": __version__,
        "recipe": recipe.to_dict(),
        "inputs": [checkpoint.fingerprint() for checkpoint in inputs.all],
        "statistics": [found.fingerprint() for found in inputs.statistics],
        "permutations": inputs.alignment.digest() if inputs.alignment is not None else None,
        "vocabulary": inputs.vocabulary.digest if inputs.vocabulary is not None else None,
        "shard_bytes": options.shard_bytes,
        "device": ",".join([device.name for device in plan.devices] or [HOST]),
        "item_threads": plan.item_threads,
        "methods_from": packages_of(plan),
    } | (
        ({"observing_threads": plan.observing_threads} if plan.observed else {})
        | ({"placement": placement(plan.items)} if plan.devices or any(i.factored for i in plan.items) else {})
    )


def run_staged(plan: Plan, inputs: Inputs, staged: StagedOutput, options: Options) -> Executor:
    """Runs the plan in this process."""
    stop = Stop()
    tensors, total = len(plan.layout.slots), plan.read_bytes / 1e9
    log.info("%d tensors to merge, %.2f GB to read; begun before: %d", tensors, total, len(staged.done))
    with kept_or_removed([staged]):
        with make_progress(plan.read_bytes, options.progress, len(plan.layout.slots)) as progress:
            executor = Executor(plan, staged, threads=options.thread_count, progress=progress, stop=stop)
            with stopped_by_signals(stop, executor):
                executor.run()
        inputs.check_unchanged()
    return executor


@contextmanager
def kept_or_removed(staged: Sequence[StagedOutput]) -> Iterator[None]:
    """Keeps what is done after a signal or a crash, removes it after an error that is sure to recur, and where an input
    has changed: nobody can tell which tensors are of which."""

    def abort(keep: bool) -> None:
        for one in staged:
            one.abort(keep=keep)

    try:
        yield
    except Interrupted as error:
        abort(keep=True)
        raise Interrupted(
            f"stopped by signal {error.exit_code - 128}; what is finished is kept: the same command continues it",
            error.exit_code - 128,
        ) from None
    except MergeError as error:
        read_failed = isinstance(error, InputError) and isinstance(error.__cause__, OSError)
        abort(keep=read_failed or isinstance(error, ClusterError | DeviceMemoryError))  # may be back in a minute
        raise
    except BaseException:
        abort(keep=True)
        raise


@contextmanager
def stopped_by_signals(stop: Stop, executor: Executor) -> Iterator[None]:
    """SIGINT and SIGTERM stop the merge between two pieces. Only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop.signal_number = number
        executor.arena.close()
        BLOCKS.interrupt()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        BLOCKS.interrupt(False)


def write_side_files(
    folder: Path,
    recipe: Recipe,
    inputs: Inputs,
    executor: Executor,
    summary: dict[str, Any],
    extras: Extras | None = None,
) -> None:
    """Everything beside the weights, into the staging folder."""
    extras = extras or Extras()
    copied = copy_beside(folder, recipe, inputs, extras)
    beside = extra_files(folder, recipe, inputs, executor)
    for name, text in extras.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    summary |= extras.summary
    summary["side_files"] = [*copied["copied"], *beside, *extras.files]
    summary["side_checksums"] = {name: f"{crc:08x}" for name, crc in beside.items()}
    summary["notes"] += copied["notes"]
    if extras.card:
        write_card(folder, recipe, summary)
    write_summary(folder, summary)


def copy_beside(folder: Path, recipe: Recipe, inputs: Inputs, extras: Extras) -> dict[str, list[str]]:
    """What a loader needs beside the weights; the names of the files, and notes."""
    new, changes = inputs.vocabulary, inputs.config_changes
    without = (
        *(new.without if new is not None else ()),
        *(() if extras.tokenizer else (*TOKENIZER, "additional_chat_templates/*")),
    )
    copied = copy_side_files(
        inputs.reference, folder, out_dtype=recipe.output_dtype, config_changes=changes, without=without
    )
    copied["copied"] += new.write(folder) if new is not None else []
    copied["notes"] += [] if extras.tokenizer else ["the base's tokenizer was not copied, as asked"]
    return copied


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    (folder / "merge.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")


def extra_files(folder: Path, recipe: Recipe, inputs: Inputs, executor: Executor) -> dict[str, int]:
    """Writes the files that the method leaves beside the weights; their checksums. An interruption loses only these."""
    what = recipe.combine_class.beside
    if not what:
        return {}
    try:
        written = write_beside(folder, executor)
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped while the {what} were written; the merged weights are kept: the same command continues",
            signal.SIGINT,
        ) from None
    inputs.check_unchanged()
    return written


def read_summary(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "merge.json").read_text())
