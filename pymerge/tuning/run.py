"""A search from start to end: what to try next, making the model, evaluating it, writing the best."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pymerge.checkpoint import check_output_path, plan_side_files
from pymerge.engine.local import Extras, Inputs, merge_to_disk, opened_plan
from pymerge.engine.plan import Options, Plan
from pymerge.engine.scaled import merge_scaled, merge_update, why_merged_anew
from pymerge.engine.summary import packages_of
from pymerge.errors import EvaluationError, NumericError, OutputError, RecipeError
from pymerge.recipe import Recipe
from pymerge.tuning.evaluate import Evaluation
from pymerge.tuning.figure import draw
from pymerge.tuning.golden import golden_section, tries
from pymerge.tuning.interruption import interruptible
from pymerge.tuning.over import Axis, Over, axes_of, combinations, recipe_at, without
from pymerge.tuning.record import How, Record, Try, opened, own_name
from pymerge.tuning.show import Display, make_display, values_text
from pymerge.version import __version__

HOW = {
    "scaled": "base + scale * update, the update merged once at scale 1: the bytes of a merge at this scale",
    "merged": "merged at these values",
}


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """tries    all that search.json holds, in order
    anew     why each try was a merge of its own; "" where updates were scaled
    updates  seconds of merging each of these"""

    best: Try
    tries: tuple[Try, ...]
    work: Path
    out: Path | None
    figure: Path | None
    anew: str
    updates: tuple[float, ...]
    notes: tuple[str, ...]


def search(
    recipe: Recipe | str | os.PathLike[str],
    evaluate: str | os.PathLike[str] | Callable[[str], Any],
    over: Over,
    *,
    out: str | os.PathLike[str] | None = None,
    tolerance: float = 0.01,
    minimize: bool = False,
    work: str | os.PathLike[str] | None = None,
    restart: bool = False,
    options: Options | None = None,
    show: bool | None = None,
) -> SearchResult:
    """The value of a hyperparameter at which the merged model scores best.

    recipe    of models on disk, or its YAML file
    evaluate  a function of the folder of a merged model that returns a number or a mapping from task to number (their
              mean counts), or the name of one: FILE.py:FUNCTION, package.module:FUNCTION, or FILE.py, a program that
              gets the folder as its argument and prints the score, or a JSON mapping, last
    over      name -> "LOW..HIGH": golden-section search for the only maximum; or -> values (a list, or "v1,v2"): all
              combinations. Names: scale (lambda, scaling), or any number of the combine, purify and calibrate steps,
              as METHOD.NAME where two have it
    out       folder for the model with the best of all values tried, of equal ones the first: what `merge` writes there
    tolerance of a range: searching stops when the best is bracketed that closely
    minimize  the evaluation is a loss
    work      folder for search.json, curve.png, and while it runs one model and one update in float32; default: the
              recipe's path, ending in .search. A search that was interrupted continues there
    restart   forget the tries in `work`
    show      a line a try on standard error; None: where that is a terminal
    Raises    RecipeError, InputError before anything is merged; EvaluationError; OutputError; Interrupted
    Cost      over the scale one merge, then for each try one pass over base and update; over others a merge a try.
              The scale counts as others do where calibrate steps come behind it."""
    options = options or Options()
    path = None if isinstance(recipe, Recipe) else Path(recipe)
    described = recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(Path(recipe))
    check_on_disk(described, "search")
    axes = axes_of(described, over)
    _check_tolerance(axes, tolerance)
    folder, target = _work(work, out, path), None if out is None else Path(out)
    first, *_ = [recipe_at(described, axes, values) for values in combinations(axes)]  # each is checked now
    inputs = _inputs(first, folder, target, options)
    evaluation = Evaluation.of(evaluate)
    identity = {
        "pymerge": __version__,
        "recipe": without(described, axes),
        "over": sorted(axis.name for axis in axes),
        "evaluation": {"name": evaluation.name, "digest": evaluation.digest},
        **inputs,
    }
    with opened(folder, identity, restart=restart) as record:
        run = _Run(described, axes, evaluation, record, replace(options, overwrite=True), minimize, make_display(show))
        with interruptible(lambda: f"{len(record.tries)} tries are kept"):
            return run.search(tolerance, target, options)


@dataclass
class _Run:
    """One run of a search: memory of what was tried is the record."""

    recipe: Recipe
    axes: Sequence[Axis]
    evaluation: Evaluation
    record: Record
    options: Options
    minimize: bool
    display: Display
    asked: int = field(default=0, init=False)  # values so far, and in all
    expected: int = field(default=0, init=False)

    @property
    def anew(self) -> str:
        """Why one update does not serve all tries."""
        if not any(axis.is_scale for axis in self.axes):
            return "the scale is not searched"
        return why_merged_anew(self.recipe, self.options.device)

    def search(self, tolerance: float, out: Path | None, options: Options) -> SearchResult:
        self.display.continued(len(self.record.tries))
        self.try_all(tolerance)
        best = self.record.best(self.minimize)
        assert best is not None
        if out is not None:
            self.write(best, out, options)
        for pattern in ("update-*", "try-*"):
            self.record.clear(pattern)
        folder = self.record.folder
        figure, note = draw(folder / "curve.png", self.record.tries, best, self.axes)
        self.record.save(best=best.number, minimize=self.minimize, merged_anew=self.anew)
        return SearchResult(
            best=best,
            tries=tuple(self.record.tries),
            work=folder,
            out=out,
            figure=figure,
            anew=self.anew,
            updates=tuple(one["seconds"] for one in self.record.updates),
            notes=tuple(text for text in (note, _at_an_end(self.axes[0], best, tolerance)) if text),
        )

    def try_all(self, tolerance: float) -> None:
        axis = self.axes[0]
        if axis.is_range:
            self.expected = tries(axis.low, axis.high, tolerance)
            sign = -1.0 if self.minimize else 1.0
            golden_section(
                lambda value: sign * self.score({axis.name: axis.rounded(value)}), axis.low, axis.high, tolerance
            )
            return
        every = combinations(self.axes)
        self.expected = len(every)
        for values in every:
            self.score(values)

    def score(self, values: dict[str, float]) -> float:
        """Of a model with these values, tried at most once."""
        self.asked += 1
        known = self.record.of(values)
        if known is None:
            known = self.attempt(values)
            self.record.tries.append(known)
            self.record.save()
            self.display.tried(known, (self.asked, self.expected), self.record.best(self.minimize) is known)
        return known.score

    def attempt(self, values: dict[str, float]) -> Try:
        number = len(self.record.tries) + 1
        recipe = recipe_at(self.recipe, self.axes, values)
        folder = self.record.folder / f"try-{recipe.digest()[:12]}"
        self.record.clear("try-*", keep=folder.name)
        where = f"try {number} ({values_text(values)})"
        try:
            how, merging = self.make(recipe, folder, values)
        except NumericError as e:
            raise type(e)(f"{where}: {e}") from e
        started = time.monotonic()
        try:
            with self.display.evaluating(where):
                score, tasks = self.evaluation(folder, where)
            self.check_tasks(tasks, where)
        except EvaluationError as e:
            self.record.failure = str(e)
            self.record.save()
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return Try(
            number=number,
            values=values,
            score=score,
            tasks=tasks,
            how=how,
            merge_seconds=round(merging, 3),
            evaluate_seconds=round(time.monotonic() - started, 3),
        )

    def make(self, recipe: Recipe, folder: Path, values: Mapping[str, float]) -> tuple[How, float]:
        """Writes the model; how, and the seconds without those for an update that others share."""
        if self.anew:
            started = time.monotonic()
            merge_to_disk(recipe, folder, self.options)
            return "merged", time.monotonic() - started
        unscaled = self.unscaled(values)
        update = self.update_of(unscaled)
        if not update.is_dir():
            self.record.clear("update-*", keep=update.name)
            summary = merge_update(unscaled, update, self.options)
            self.record.updates.append({"recipe": unscaled.digest(), "seconds": summary["seconds"]})
            self.record.save()
        started = time.monotonic()
        merge_scaled(recipe, update, folder, replace(self.options, resume=False))
        return "scaled", time.monotonic() - started

    def unscaled(self, values: Mapping[str, float]) -> Recipe:
        return recipe_at(self.recipe, self.axes, {**values, "scale": 1.0})

    def update_of(self, unscaled: Recipe) -> Path:
        return self.record.folder / f"update-{unscaled.digest()[:12]}"

    def check_tasks(self, tasks: Mapping[str, float], where: str) -> None:
        if self.record.tries and set(tasks) != set(self.record.tries[0].tasks):
            before = ", ".join(self.record.tries[0].tasks) or "one number"
            raise EvaluationError(
                f"{where}: {self.evaluation.name} gave {', '.join(tasks) or 'one number'}, in earlier tries {before}: "
                "their means cannot be compared"
            )

    def write(self, best: Try, out: Path, options: Options) -> None:
        """The model with the best values, from the update where it is still there."""
        recipe = recipe_at(self.recipe, self.axes, best.values)
        update = self.update_of(self.unscaled(best.values))
        scaled = not self.anew and update.is_dir()
        found = {
            "values": dict(best.values),
            "score": best.score,
            "tasks": dict(best.tasks),
            "tries": len(self.record.tries),
            "evaluation": self.evaluation.name,
            "how": HOW["scaled" if scaled else "merged"],
        }
        if scaled:
            merge_scaled(recipe, update, out, options, {"search": found})
        else:
            merge_to_disk(recipe, out, options, Extras(summary={"search": found}))


def check_on_disk(recipe: Recipe, what: str) -> None:
    """RecipeError where the recipe holds what no YAML file could."""
    if any(model.in_memory for model in (*recipe.models, *([recipe.base] if recipe.base else []))):
        raise RecipeError(f"{what}: models must be folders: what it makes is written to disk")
    if recipe.align is not None and recipe.align.in_memory:
        raise RecipeError(
            f"{what}: align: permutations and samples must be files, groups those of a known architecture"
        )


def _at_an_end(axis: Axis, best: Try, tolerance: float) -> str:
    value = best.values[axis.name]
    if axis.is_range and min(abs(value - axis.low), abs(axis.high - value)) < 2 * tolerance:
        return f"the best is at an end of the range of {axis.name}: a wider range may have a better one"
    return ""


def _check_tolerance(axes: Sequence[Axis], tolerance: float) -> None:
    for axis in axes:
        if axis.is_range and not 10 * axis.step <= tolerance < axis.high - axis.low:
            raise RecipeError(
                f"tolerance: must be at least {10 * axis.step:g} and below the width of the range, "
                f"{axis.high - axis.low:g}; got {tolerance:g}"
            )


def _work(work: str | os.PathLike[str] | None, out: str | os.PathLike[str] | None, recipe: Path | None) -> Path:
    if work is not None:
        return Path(work)
    if recipe is not None:
        return recipe.with_suffix(".search")
    if out is not None:
        return Path(f"{os.fspath(out)}.search")
    raise RecipeError("search: say where the tries are kept: work=")


def _inputs(recipe: Recipe, work: Path, out: Path | None, options: Options) -> dict[str, Any]:
    """Fingerprints of the inputs. Refuses now what would be refused later: inputs, plan, places of the output."""
    with opened_plan(recipe, options) as (inputs, plan):
        check_output_path(work / "try", inputs.all)
        if out is not None:
            check_output_path(out, inputs.all, overwrite=options.overwrite)
            if work.resolve().is_relative_to(out.resolve()):
                raise OutputError(f"{out}: the tries are kept in {work}, which is not beside it: choose another --work")
            if own_name(work, out):
                raise OutputError(f"{out}: the search deletes what has such a name in {work}: choose another")
        plan_side_files(inputs.reference)
        return fingerprints(inputs, plan)


def fingerprints(inputs: Inputs, plan: Plan) -> dict[str, Any]:
    """What a score depends on beside recipe and evaluation."""
    return {
        "methods_from": packages_of(plan),
        "inputs": [checkpoint.fingerprint() for checkpoint in inputs.all],
        "statistics": [found.fingerprint() for found in inputs.statistics],
        "permutations": inputs.alignment.digest() if inputs.alignment is not None else None,
        "vocabulary": inputs.vocabulary.digest if inputs.vocabulary is not None else None,
    }
