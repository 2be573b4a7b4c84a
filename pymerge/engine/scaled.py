"""One recipe at many scales: the update is merged once, at scale 1; then each scale is one pass over base and update.

A combine step's `scale` multiplies its update last, in float32, before the base is added and the sum rounded. So the
update, kept in float32, times any scale gives the bits of a merge at that scale.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from pymerge.checkpoint import Checkpoint, open_checkpoint, plan_layout
from pymerge.engine.check import Entry
from pymerge.engine.devices import HOST, names_of
from pymerge.engine.execute import Executor
from pymerge.engine.local import (
    identity,
    open_inputs,
    planned,
    read_summary,
    write_folder,
    write_side_files,
    write_summary,
)
from pymerge.engine.plan import Options
from pymerge.methods.matrices import OfTaskVectors
from pymerge.methods.param import params_of
from pymerge.recipe import Recipe, Steps


def why_merged_anew(recipe: Recipe, device: str = HOST) -> str:
    """Why the recipe at another scale is another merge; "" where one update serves all scales."""
    devices, host = names_of(device)
    if len(devices) + host > 1:
        return "what fits which device depends on the dtype that is written"
    scale = params_of(recipe.combine_class).get("scale")
    if scale is None or scale.per_model:
        return f"{recipe.method} has no scale"
    if recipe.combine_class.beside:
        return f"the {recipe.combine_class.beside} beside the weights are of one scale"
    if recipe.calibrate:
        return f"{recipe.calibrate[0].method} comes behind the scale"
    if recipe.modules:
        return "it has slices or modules"
    if recipe.align is not None:
        return "the models' units are put in one order first"
    if recipe.other_rows or recipe.chat_template is not None:
        return "the models' vocabularies become one first"
    if recipe.sequential:
        return f"{recipe.method} observes layers behind those that are merged at that scale"
    return ""


def merge_update(recipe: Recipe, folder: str | Path, options: Options | None = None) -> dict[str, Any]:
    """Merges the update of a recipe whose scale is 1 into `folder`: float32, the base not added, merged tensors only.

    Returns  the summary, which folder/merge.json holds.
    Raises   as merge_to_disk.
    Cost     as merge_to_disk; 4 bytes an entry on disk."""
    options, started = options or Options(), time.monotonic()
    with ExitStack() as stack:
        inputs = open_inputs(recipe, options, stack)
        plan = planned(recipe, inputs, options, updates)
        # Where memory is short, wider outputs would leave other numbers of threads to a matrix, and other bits.
        plan = replace(plan, item_threads=planned(recipe, inputs, options).item_threads)
        # Components too lie in one folder: nothing but this module reads it.
        held = {item.entry.name: (item.entry.name, item.entry.dtype, item.entry.shape) for item in plan.items}
        plan = replace(plan, layout=plan_layout([held[name] for name in plan.layout.slots], options.shard_bytes))

        def side_files(into: Path, executor: Executor, summary: dict[str, Any]) -> None:
            write_summary(into, summary)

        same = identity(recipe, inputs, options, plan) | {"update": True}
        return write_folder(Path(folder), plan, inputs, options, same, side_files, started=started)


def merge_scaled(
    recipe: Recipe,
    update: str | Path,
    out: str | Path,
    options: Options | None = None,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes what merge_to_disk would write, from what merge_update left for the same recipe at scale 1.

    recipe   one that `why_merged_anew` has nothing against
    extra    goes into the summary
    Returns  the summary of the merge; seconds and bytes are those of this pass.
    Cost     one pass: base and update are read, the output is written. Runs on the CPU, whatever `options.device`."""
    options, started = replace(options or Options(), device="cpu"), time.monotonic()
    with ExitStack() as stack:
        inputs = open_inputs(recipe, options, stack)
        held = stack.enter_context(open_checkpoint(update))
        plan = planned(recipe, inputs, options, lambda entries: scaled(entries, held))

        def side_files(folder: Path, executor: Executor, summary: dict[str, Any]) -> None:
            held.check_unchanged()
            summary |= {"per_tensor": read_summary(update)["per_tensor"], **(extra or {})}
            write_side_files(folder, recipe, inputs, executor, summary)

        same = identity(recipe, inputs, options, plan) | {"update": held.fingerprint()}
        return write_folder(Path(out), plan, inputs, options, same, side_files, started=started)


def updates(entries: Sequence[Entry]) -> list[Entry]:
    """The merged entries alone, without the base."""
    return [replace(entry, dtype="F32", shape=entry.merged_shape, adds=False) for entry in entries if entry.merged]


def scaled(entries: Sequence[Entry], update: Checkpoint) -> list[Entry]:
    """The entries with their finished update in place of the models' tensors."""
    found = []
    for entry in entries:
        if entry.steps is not None:
            factor = entry.steps.combine.factor_of(entry.name, bool(entry.inputs))
            steps = Steps(purify=(), combine=OfTaskVectors(how="sum", scale=factor), calibrate=())
            alone = replace(
                entry, weights=(), inputs=(), transposed=False, split=None, join=None, parts=(), subtracts=False
            )
            entry = replace(alone, tuned=(update[entry.name],), steps=steps)
        found.append(entry)
    return found
