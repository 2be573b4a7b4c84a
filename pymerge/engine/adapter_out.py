"""A merge whose result is a LoRA adapter of the base: adapter_config.json and adapter_model.safetensors, as PEFT has
them. Not resumable: its tensors wait in a file without a name until all is known."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pymerge.checkpoint import ITEMSIZE, TORCH_NAME, Checkpoint, check_output_path, safe_name
from pymerge.checkpoint.lora import CONFIG, PREFIX, WEIGHTS, AdapterCheckpoint
from pymerge.checkpoint.place import replace_folder, staging_of, sync_tree
from pymerge.checkpoint.side_tensors import SideTensors
from pymerge.checkpoint.tied import feeds_head
from pymerge.engine.check import Entry
from pymerge.engine.factored import SHARE, rank_sum
from pymerge.engine.local import Inputs, open_inputs, planned, stopped_by_signals, write_summary
from pymerge.engine.plan import SLACK, SMALLEST_ARENA, Options, Plan, too_little_memory
from pymerge.engine.progress import make_progress
from pymerge.engine.scaled import updates
from pymerge.engine.summary import FORMAT, packages_of
from pymerge.errors import OutputError, RecipeError
from pymerge.recipe import Recipe
from pymerge.recipe.references import refuse_base
from pymerge.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.engine.adapter_sink import AdapterSink
    from pymerge.engine.spill import Spilled

CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # model types whose matrices are stored [in, out]


def merge_to_adapter(
    recipe: Recipe, out: str | Path, rank: int | None, options: Options | None = None
) -> dict[str, Any]:
    """Merges into the adapter folder `out`, which appears complete or not at all.

    rank     of the factors of each matrix (less where a matrix, or what is merged, has less); None: that of the merged
             adapters, exactly
    Returns  the summary, which out/merge.json holds too: `error` is ||update - factors|| / ||update|| over all
             matrices, per_tensor has it for each. Tensors that are no matrices are in the adapter whole where they
             change (modules_to_save); `left_out` lists what an adapter cannot hold, biases beside factors.
    Raises   as merge_to_disk; RecipeError where there is no base to adapt, or a rank is needed.
    Cost     as merge_to_disk; the adapter is written twice. Updates that are no factors are decomposed one matrix at a
             time, in float32 with a float64 Gram matrix, of the memory that options leave."""
    import torch

    from pymerge.engine.adapter_sink import AdapterExecutor, AdapterSink
    from pymerge.engine.execute import Stop
    from pymerge.engine.spill import Spill

    options = options or Options()
    check_recipe(recipe, rank)
    with ExitStack() as stack:
        inputs = open_inputs(recipe, options, stack)
        if several := [name for name in inputs.reference.components if name]:
            raise RecipeError(f"an adapter is of one model: merge the folder of one component ({', '.join(several)})")
        target = check_output_path(out, inputs.all, overwrite=options.overwrite)
        plan = planned(recipe, inputs, options, updates)
        entries = {item.entry.name: item.entry for item in plan.items}
        matrices = {name for name, entry in entries.items() if recipe.matrices.has(name, entry.shape)}
        check_rank(plan, matrices, rank)
        if any(item.entry.name in matrices and not item.factored for item in plan.items):
            options = without(options, {name: entries[name].shape for name in matrices}, rank or 0)
            plan = planned(recipe, inputs, options, updates)
        code = recipe.output_dtype or "F32"
        needed = 2 * ITEMSIZE[code] * sum(factor_entries(entries[name], rank) for name in matrices)
        spill = stack.enter_context(closing(Spill(target.parent, needed)))
        dtype = getattr(torch, TORCH_NAME[code])
        sink = AdapterSink(entries, matrices, rank, dtype, spill)
        stop = Stop()
        with make_progress(plan.read_bytes, options.progress, len(plan.layout.slots)) as progress:
            executor = AdapterExecutor(plan, sink, threads=options.thread_count, progress=progress, stop=stop)
            with stopped_by_signals(stop, executor):
                executor.run()
        inputs.check_unchanged()
        return write_adapter(target, recipe, inputs, plan, sink)


def extract(
    model: str | Path,
    base: str | Path,
    out: str | Path,
    rank: int,
    *,
    exclude: Sequence[str] = (),
    options: Options | None = None,
) -> dict[str, Any]:
    """What a model has more than its base, as an adapter of this rank. Returns, raises: as merge_to_adapter."""
    refuse_base(base, [model], "extract")
    given = {"weight": 1.0, "scale": 1.0, "exclude": list(exclude)}
    recipe = Recipe.from_kwargs(os.fspath(base), [os.fspath(model)], "task_arithmetic", **given)
    return merge_to_adapter(recipe, out, rank, options)


def check_recipe(recipe: Recipe, rank: int | None) -> None:
    if recipe.modules:
        raise RecipeError("slices and modules make a whole model: not as an adapter")
    if recipe.base is None or not recipe.subtract_base:
        raise RecipeError("an adapter is a change of a base: give base_model and a method that merges task vectors")
    if rank is not None and rank < 1:
        raise RecipeError(f"rank: must be at least 1, got {rank}")
    if recipe.align is not None:
        raise RecipeError("align moves units of the models: write a whole model, not an adapter")
    if recipe.other_rows or recipe.chat_template is not None:
        raise RecipeError(
            "an adapter has no tokenizer of its own: write a whole model, or leave the tokenizer keys out"
        )
    if recipe.sequential:
        raise RecipeError(f"{recipe.method} runs each layer behind those that are merged: write a whole model")
    if what := recipe.combine_class.beside:
        raise RecipeError(f"{recipe.method} leaves {what} beside a whole model: not as an adapter")


def check_rank(plan: Plan, matrices: set[str], rank: int | None) -> None:
    whole = [item.entry.name for item in plan.items if item.entry.name in matrices and not item.factored]
    if whole and rank is None:
        raise RecipeError(
            f"rank (--rank): must be given, the update of {len(whole)} matrices ({whole[0]}, ...) is not made of "
            "adapters' factors: the steps need whole matrices, or the ranks of all adapters sum to more than "
            f"1/{SHARE} of the smaller side"
        )


def factor_entries(entry: Entry, rank: int | None) -> int:
    """Of both factors of a matrix, at most."""
    m, n = entry.shape
    return min(m, n, rank_sum(entry) if rank is None else rank) * (m + n)


def without(options: Options, shapes: Mapping[str, tuple[int, ...]], rank: int) -> Options:
    """The options less the memory for decompositions of updates of these shapes."""
    from pymerge.engine.adapter_sink import decomposition_bytes

    held, name = max((decomposition_bytes(m, n, rank), name) for name, (m, n) in shapes.items())
    if options.memory_bytes < (needed := held + SLACK + SMALLEST_ARENA):
        what = f"decomposing the update of {safe_name(name)} {list(shapes[name])}"
        raise too_little_memory(options.memory_bytes, needed, what)
    return replace(options, memory=options.memory_bytes - held)


def write_adapter(target: Path, recipe: Recipe, inputs: Inputs, plan: Plan, sink: AdapterSink) -> dict[str, Any]:
    """Tensors, config and summary into a folder beside `target`, which then takes its place."""
    from pymerge.engine.spill import bytes_of

    tensors, config, left_out = adapter_of(inputs, sink, recipe.output_dtype or "F32")
    summary = summary_of(recipe, inputs, plan, sink, left_out) | {"r": config["r"]}
    staging = staging_of(target)
    try:
        staging.mkdir(parents=True)
        try:
            entries = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
            with SideTensors(staging / WEIGHTS[0], entries, {"format": "pt"}) as file:
                for name, tensor in tensors.items():
                    at = 0
                    for part in tensor.parts():
                        file.write(name, at, bytes_of(part))
                        at += part.nbytes
            (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            write_summary(staging, summary)
            sync_tree(staging)
            replace_folder(staging, target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except FileExistsError:
        raise OutputError(f"{staging}: is there already, from another or an interrupted merge: delete it") from None
    except OSError as e:
        raise OutputError(f"{target}: the adapter cannot be written: {e.strerror or e}") from e
    return summary


def summary_of(
    recipe: Recipe, inputs: Inputs, plan: Plan, sink: AdapterSink, left_out: Mapping[str, float]
) -> dict[str, Any]:
    square = math.fsum(low.norm**2 for low in sink.low.values())  # exact: in any order
    lost = math.fsum((low.error * low.norm) ** 2 for low in sink.low.values())
    facts = {name: {"rank": low.rank, "error": low.error, **sink.facts.get(name, {})} for name, low in sink.low.items()}
    return {
        "format": FORMAT,
        "pymerge": __version__,
        "recipe": recipe.to_dict(),
        **({"methods_from": packages} if (packages := packages_of(plan)) else {}),
        "inputs": [checkpoint.fingerprint() for checkpoint in inputs.all],
        "matrices": len(sink.low),
        "whole": sorted(sink.whole.keys() - left_out.keys()),
        "left_out": left_out,
        "error": (lost / square) ** 0.5 if square else 0.0,
        "notes": [*recipe.notes, *plan.notes],
        "per_tensor": facts,
    }


class Written(NamedTuple):
    """A tensor of the adapter: safetensors dtype, shape, and what gives its values, a contiguous part at a time."""

    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]


def adapter_of(
    inputs: Inputs, sink: AdapterSink, dtype: str
) -> tuple[dict[str, Written], dict[str, Any], dict[str, float]]:
    """Tensors and config of the adapter; what it cannot hold: name -> size of the change over that of the tensor."""
    from pymerge.engine.adapter_sink import with_update

    base = inputs.base
    assert base is not None
    named = next((m.name_in_adapter for m in inputs.models if isinstance(m, AdapterCheckpoint)), str)
    transposed = (base.config or {}).get("model_type") in CONV1D
    tensors: dict[str, Written] = {}
    ranks: dict[str, int] = {}
    for name in filter(sink.low.__contains__, base.file_order()):  # whichever was finished first
        low = sink.low[name]
        module = named(name.removesuffix(".weight"))
        sides = (low.right, low.left) if not transposed else (low.left, low.right)
        for side, kept in zip("AB", sides, strict=True):
            tensors[f"{PREFIX}{module}.lora_{side}.weight"] = written(kept, dtype, transposed)
        ranks[module] = low.rank
    saved, left_out = [], {}
    for name in filter(sink.whole.__contains__, base.file_order()):
        weight, update = base[name], sink.whole[name]
        module = named(name.rpartition(".")[0])
        if not module or module in ranks:
            left_out[name] = float(update.load().norm()) / max(1e-30, float(weight.load().float().norm()))
            continue
        tensors[f"{PREFIX}{named(name)}"] = Written(weight.dtype, weight.shape, partial(with_update, weight, update))
        saved.append(module)
    return tensors, config_of(inputs, base, ranks, list(dict.fromkeys(saved)), transposed), left_out


def written(kept: Spilled, dtype: str, transposed: bool) -> Written:
    """A factor, or its transpose."""
    shape = kept.shape[::-1] if transposed else kept.shape
    return Written(dtype, shape, lambda: [kept.load().mT.contiguous() if transposed else kept.load()])


def config_of(
    inputs: Inputs, base: Checkpoint, ranks: Mapping[str, int], saved: list[str], transposed: bool
) -> dict[str, Any]:
    """adapter_config.json: alpha is r everywhere, the scale is 1."""
    given = next((m.adapter_config.raw for m in inputs.models if isinstance(m, AdapterCheckpoint)), {})
    r = max(ranks.values(), default=1)
    other = {module: rank for module, rank in ranks.items() if rank != r}
    config = {
        "peft_type": "LORA",
        "task_type": given.get("task_type"),
        "base_model_name_or_path": given.get("base_model_name_or_path") or base.place,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": list(ranks),
        "rank_pattern": other,
        "alpha_pattern": other,
        "modules_to_save": saved or None,
        "use_rslora": False,
        "use_dora": False,
    }
    if any(feeds_head(base, f"{module}.weight") for module in saved):
        config["ensure_weight_tying"] = True
    return config


def describe_adapter(out: str | Path, summary: Mapping[str, Any]) -> str:
    """The closing words of a command."""
    lines = [
        f"{out}: adapter of rank {summary['r']}, {summary['matrices']} matrices, {len(summary['whole'])} tensors whole"
        f"; relative error of the update {summary['error']:.2g} (per matrix in merge.json)"
    ]
    if left := list(summary["left_out"]):
        more = f" and {len(left) - 10} more" if len(left) > 10 else ""
        lines.append(f"  note: changes that an adapter cannot hold are left out: {', '.join(left[:10])}{more}")
    return "\n".join(lines + [f"  note: {note}" for note in summary["notes"]])
