"""The models of a recipe with their units in one order: permutations given or found, checked, applied as tensors are
read.

The anchor is the base where there is one: every model, and so every task vector, is then in the base's order. Without
a base it is the first model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint import Checkpoint
from pymerge.engine.inputs import same_files
from pymerge.errors import InputError, RecipeError
from pymerge.methods.base import TensorInfo
from pymerge.methods.linear import Linear
from pymerge.recipe import ModelRef, Recipe
from pymerge.recipe.align import METHOD, Align, parse_align
from pymerge.recipe.problems import Problems
from pymerge.recipe.references import split_adapter
from pymerge.remote.mirror import is_remote

if TYPE_CHECKING:
    from pymerge.align import Clusters, Permutations
    from pymerge.engine.local import Inputs
    from pymerge.engine.plan import Options

Progress = Callable[[int, float], None]


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """units: of which `rows` are the recipe's models, in the order of `sources`; notes for the summary."""

    units: Permutations | Clusters
    rows: tuple[int, ...]
    notes: tuple[str, ...] = field(default=())

    def digest(self) -> str:
        """Equal for equal permutations: part of what a resumed merge must find again."""
        digest = hashlib.blake2b(repr(self.rows).encode(), digest_size=16)
        for group, views in self.units.index.items():
            for view, index in views.items():
                digest.update(repr((group, view)).encode() + index.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """What merge.json says: the models by the names that they were aligned under, the anchor first; per group units
        moved, similarity before and after, gap of the assignment."""
        return {"models": list(self.units.models), "permutations": self.digest(), **self.units.report}


def sources(recipe: Recipe, inputs: Inputs) -> list[tuple[ModelRef, Checkpoint]]:
    """The distinct models of a recipe, the anchor first."""
    refs = ([recipe.base] if recipe.base is not None else []) + list(recipe.models)
    opened = ([inputs.base] if inputs.base is not None else []) + list(inputs.models)
    return list({id(model): (ref, model) for ref, model in zip(refs, opened, strict=True)}.values())


def with_given(recipe: Recipe, inputs: Inputs) -> Inputs:
    """The inputs in the order that the recipe's permutations say; as they are where there are none, or none yet."""
    align = recipe.align
    if align is None:
        return inputs
    if align.file is None:
        refuse_what_zip_is_not_for(recipe, align.options.get("mode"))
        anchor, model = sources(recipe, inputs)[0]
        if anchor.in_memory and align.data is not None and align.batches is None:
            raise RecipeError(
                f"align: data: {align.data} is made into batches by the tokenizer or image processor in the first "
                "model's folder, and the models are in memory: give batches"
            )
        check_spec(align, anchor, model)
        for ref, _ in sources(recipe, inputs) if has_samples(align) else ():
            if not ref.in_memory and is_remote(ref.local):
                raise RecipeError(
                    f"align: {ref.path}: samples run through local models: copy it first, or align by the weights "
                    "alone, without data"
                )
            if not ref.in_memory and split_adapter(ref.local) is not None:
                raise RecipeError(
                    f"align: {ref.path}: samples run through whole models: merge the adapter into its base first, or "
                    "align by the weights alone, without data"
                )
        return inputs
    from pymerge.align import Clusters, Permutations, open_permutations

    units = align.value if align.value is not None else open_permutations(align.file)
    if not isinstance(units, Permutations | Clusters):
        given = type(units).__name__
        raise RecipeError(f"align: must be permutations, their file or {{method: mudsc, ...}}, got {given}")
    return aligned(recipe, inputs, units)


def has_samples(align: Align) -> bool:
    return align.data is not None or align.batches is not None


def check_spec(align: Align, ref: ModelRef, model: Checkpoint) -> None:
    """Refuses now what the search would: an architecture whose units nobody has described."""
    from pymerge.align.specs import floating_shapes, spec_for

    given = align.options.get("spec")
    if not ref.in_memory and (given is None or isinstance(given, str)):
        spec_for(floating_shapes(model), model.config, given, tie_heads=align.options.get("tie_heads", True))


def with_found(recipe: Recipe, inputs: Inputs, options: Options) -> Inputs:
    """The inputs in the order that a search for permutations finds."""
    assert recipe.align is not None
    models: list[Any] = []
    for ref, model in sources(recipe, inputs):  # as they were opened: an adapter alone is of this recipe's base
        on_disk = ref.local if has_samples(recipe.align) else model
        models.append(ref.value if ref.in_memory else on_disk)
    return aligned(recipe, inputs, find(models, recipe.align, memory=options.memory_bytes))


def parsed_search(asked: Mapping[str, Any]) -> Align:
    """What `align: {method: mudsc, ...}` of a recipe means; keys with None are left out."""
    problems = Problems("align")
    raw = {"method": METHOD} | {key: value for key, value in asked.items() if value is not None}
    align = parse_align(raw, problems, python=False, must_exist=True)
    problems.raise_if_any()
    assert align is not None
    return align


def find(
    models: Sequence[Any], align: Align, *, memory: int, progress: Progress | None = None
) -> Permutations | Clusters:
    """What pymerge.find_permutations returns for a recipe's `align`. Samples are made by the first model's folder."""
    from pymerge.align.api import find_permutations

    batches = align.batches
    if align.data is not None and batches is None:
        from pymerge.statistics.samples import batches_of

        batches = batches_of(Path(models[0]), Path(align.data), **align.sampling)
    return find_permutations(models, batches, memory=memory, progress=progress, **align.search)


def aligned(recipe: Recipe, inputs: Inputs, units: Permutations | Clusters) -> Inputs:
    """The inputs as their units say, after a check that they are of these models."""
    from pymerge.align.view import aligned_statistics, aligned_view

    found = sources(recipe, inputs)
    alignment = checked(recipe, found, units)
    row = {id(model): row for (_, model), row in zip(found, alignment.rows, strict=True)}
    views = {id(model): aligned_view(model, units, row[id(model)]) for _, model in found}
    rows = [row[id(model)] for model in inputs.models]
    return replace(
        inputs,
        base=views[id(inputs.base)] if inputs.base is not None else None,
        models=tuple(views[id(model)] for model in inputs.models),
        fisher=tuple(aligned_view(fisher, units, r) for fisher, r in zip(inputs.fisher, rows, strict=False)),
        statistics=tuple(aligned_statistics(s, units, r) for s, r in zip(inputs.statistics, rows, strict=False)),
        alignment=alignment,
    )


def checked(recipe: Recipe, found: Sequence[tuple[ModelRef, Checkpoint]], units: Permutations | Clusters) -> Alignment:
    """Which of the aligned models each of the recipe's is; InputError where one is not among them."""
    from pymerge.align import Clusters
    from pymerge.align.specs import floating_shapes
    from pymerge.align.view import known_names

    refuse_what_zip_is_not_for(recipe, "zip" if isinstance(units, Clusters) else None)
    units.check()
    rows, notes = rows_of(found, units)
    if isinstance(units, Clusters) and len(rows) < len(units.models):
        raise RecipeError(f"align: a zip is the mean of all its models: merge {', '.join(units.models)}")
    for _, model in found:
        known = known_names(model, units.spec)
        units.spec.check({known[name]: shape for name, shape in floating_shapes(model).items()})
    return Alignment(units=units, rows=rows, notes=notes)


def rows_of(
    found: Sequence[tuple[ModelRef, Checkpoint]], units: Permutations | Clusters
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The aligned model that each of the recipe's is, and notes.

    By their files where both have some: the same size, header and time, or, at its own place, all but the time (a
    copy). Else by their order."""
    known, own = units.fingerprints, [model.fingerprint() for _, model in found]
    if not known or not all("files" in one for one in (*known, *own)):
        if len(found) != len(units.models):
            raise InputError(
                f"align: the permutations are of {len(units.models)} models, the recipe has {len(found)} (a base "
                "counts): align the models of this recipe"
            )
        on_disk = not any(ref.in_memory for ref, _ in found)
        note = (
            f"align: {', '.join(ref.path for ref, _ in found)} are taken for {', '.join(units.models)}, in this order"
        )
        return tuple(range(len(found))), (note,) if on_disk else ()
    rows = [exact_row(files, place, known) for place, files in enumerate(own)]
    notes, problems = [], []
    for place, (ref, _) in enumerate(found):
        if rows[place] >= 0:
            continue
        if place >= len(known) or place in rows or not same_files(known[place], own[place], time=False):
            problems.append(
                f"align: {ref.path} is not one of the models that were aligned ({', '.join(units.models)}): run "
                "`pymerge align` on the models of this recipe, the base first where there is one"
            )
        elif known[place]["path"] == own[place]["path"]:
            problems.append(f"align: {ref.path} has been written since it was aligned: align it again")
        else:
            rows[place] = place
            notes.append(f"align: {ref.path} is taken for {units.models[place]}: equal size and header, another time")
    if not problems and len(set(rows)) < len(rows):
        problems.append(
            f"align: which model is which of {', '.join(units.models)} cannot be told: give them in this order"
        )
    if problems:
        raise InputError("\n".join(problems))
    return tuple(rows), tuple(notes)


def exact_row(files: Mapping[str, Any], place: int, known: Sequence[Mapping[str, Any]]) -> int:
    """The aligned model with files of the same size, header and time, -1 if there is none. Where several have them
    (unpacked from one archive): the one of the same path, else the one at the same place."""
    rows = [row for row, said in enumerate(known) if same_files(said, files, time=True)]
    by_path = [row for row in rows if known[row]["path"] == files["path"]]
    at_place = [row for row in rows if row == place]
    return (by_path + at_place + rows + [-1])[0]


def refuse_what_zip_is_not_for(recipe: Recipe, mode: str | None) -> None:
    """A zip puts units of all models together: it is their plain mean and nothing else."""
    if mode != "zip":
        return
    whole = not (recipe.exclude or recipe.include)
    if recipe.method == "linear" and recipe.static and whole:
        tasks = len(recipe.models)
        combine = recipe.steps_for("", 0.0).combine
        assert isinstance(combine, Linear)
        rule = combine.rule(TensorInfo(name="", shape=(1,), tasks=tasks))
        if all(math.isclose(tasks * weight, rule.divisor) for weight in rule.weights):
            return
    raise RecipeError(
        "align: a zip is the mean of all models: merge_method linear with equal weights that sum to 1, no exclude, no "
        "include; for other methods align with mode permute"
    )
