"""A sweep: every combination of a grid of hyperparameters, merged in one pass over the inputs."""

from __future__ import annotations

import os
import re
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.checkpoint import Layout, check_output_path
from pymerge.checkpoint.journal import normal_form
from pymerge.checkpoint.place import holds_model, staging_of
from pymerge.engine.local import read_summary
from pymerge.engine.many import Pass, Setting, merge_many, planned_many, why_apart
from pymerge.engine.plan import Options
from pymerge.errors import OutputError, RecipeError
from pymerge.recipe import Recipe
from pymerge.tuning.evaluate import Evaluation
from pymerge.tuning.interruption import interruptible
from pymerge.tuning.over import Axis, Over, axes_of, combinations, recipe_at, without
from pymerge.tuning.record import locked
from pymerge.tuning.run import check_on_disk, fingerprints
from pymerge.tuning.show import Display, make_display
from pymerge.tuning.table import FILE, Row, Table
from pymerge.version import __version__

FILES = 64  # open files that are not of the outputs: inputs, standard streams, the evaluation's


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """rows   of all combinations, in order; sweep.json holds them
    passes    over the inputs that this call took; none where all was there
    apart     why each output took a pass of its own; "" where one pass served several
    best      with an evaluation
    """

    rows: tuple[Row, ...]
    passes: tuple[Pass, ...]
    apart: str
    best: Row | None
    out: Path


def sweep(
    recipe: Recipe | str | os.PathLike[str],
    grid: Over,
    *,
    out: str | os.PathLike[str],
    evaluate: str | os.PathLike[str] | Callable[[str], Any] | None = None,
    minimize: bool = False,
    discard: bool = False,
    options: Options | None = None,
    show: bool | None = None,
) -> SweepResult:
    """Merges a recipe at every combination of a grid of hyperparameters; the inputs are read once for all.

    recipe    of models on disk, or its YAML file
    grid      name -> values (a list, or "v1,v2"; of whole numbers also "LOW..HIGH"). Names as in `search`: scale
              (lambda, scaling), or any number of the combine, purify and calibrate steps
    out       folder for sweep.json (the table of settings) and a folder for each combination, such as
              density=0.1,lambda=0.5, with what `merge` writes at these values
    evaluate  as in `search`; each merged model's score goes into the table
    minimize  the evaluation is a loss
    discard   delete each model when its score is known. As many models as the disk has room for are then made in a pass
    options   overwrite: also replaces models in `out` that are not of this sweep
    show      a line an output on standard error; None: where that is a terminal
    Raises    RecipeError, InputError, OutputError (disk space, open files) before anything is merged; EvaluationError;
              Interrupted, and the same call continues. A sweep may be continued with more values
    Cost      one pass over the inputs; settings that differ in the scale alone are merged once, the others each."""
    options = options or Options()
    described = recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(Path(recipe))
    check_on_disk(described, "sweep")
    if discard and evaluate is None:
        raise RecipeError("sweep: discard: models are deleted when they have been evaluated: say how, or keep them")
    axes, folder = _axes(described, grid), Path(out)
    settings, rows = _settings(described, axes, folder)
    evaluation = None if evaluate is None else Evaluation.of(evaluate)
    with planned_many(settings, options) as (inputs, plans):
        same = {
            "recipe": without(described, axes),
            "grid": sorted(axis.name for axis in axes),
            **fingerprints(inputs, plans[0]),
        }
        scored_by = None if evaluation is None else {"name": evaluation.name, "digest": evaluation.digest}
        check_output_path(folder / "sweep", inputs.all)
        if not (folder / FILE).exists() and holds_model(folder):
            raise OutputError(f"{folder}: holds a model, and no sweep: choose another folder")
        with locked(folder, "sweep", "choose another folder"):
            table = Table(folder, same, scored_by, rows, apart=why_apart(described))
            table.continued()
            run = _Run(table, settings, evaluation, minimize, discard, options, make_display(show))
            missing = run.missing()
            for setting in missing:
                check_output_path(setting.out, inputs.all, overwrite=options.overwrite)
            with interruptible(lambda: "what is finished is kept"):
                return run.run(missing, run.at_once(len(missing), plans[0].layout))


@dataclass
class _Run:
    """One run of a sweep."""

    table: Table
    settings: Sequence[Setting]
    evaluation: Evaluation | None
    minimize: bool
    discard: bool
    options: Options
    display: Display

    def __post_init__(self) -> None:
        self.rows = {row.folder: row for row in self.table.rows}

    def missing(self) -> list[Setting]:
        """What is to be merged: models that are not there, unless all that is wanted of them is a score that is."""
        return [one for one in self.settings if not (self.is_made(one) or (self.discard and self.is_scored(one)))]

    def is_scored(self, setting: Setting) -> bool:
        return self.rows[setting.label].score is not None

    def is_made(self, setting: Setting) -> bool:
        """Whether the model in the folder is this setting's, with its weights."""
        try:
            found = read_summary(setting.out)
        except (OSError, ValueError):
            return False
        wanted = {"pymerge": __version__, "recipe": setting.recipe.to_dict(), "inputs": self.table.identity["inputs"]}
        if normal_form(wanted) != {key: found.get(key) for key in wanted}:
            return False
        return sum(file.stat().st_size for file in setting.out.rglob("*.safetensors")) >= found.get("bytes_written", 0)

    def at_once(self, missing: int, layout: Layout) -> int:
        """How many models there may be at a time. OutputError where the disk or the open files do not suffice."""
        size, free = layout.disk_size, shutil.disk_usage(self.table.folder).free
        begun = sum(staging_of(one.out).is_dir() for one in self.settings)
        fitting = begun + free // max(1, size)
        files, limit = len(layout.shards) + 2, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - FILES
        open_at_once = limit // files
        if self.discard:
            at_once = min(missing, fitting, open_at_once)
            if at_once or not missing:
                return at_once
        if missing > fitting:
            raise OutputError(
                f"{self.table.folder}: the sweep writes {missing} models of {size / 1e9:.2f} GB, "
                f"{missing * size / 1e9:.2f} GB in all; the disk has {free / 1e9:.2f} GB free. Sweep fewer values, "
                "choose another disk, or have the models evaluated and deleted (--eval, --discard)"
            )
        if missing > open_at_once:
            raise OutputError(
                f"a pass over {missing} models keeps {missing * files} files open, {max(0, limit)} are left: raise the "
                "limit (ulimit -n), write fewer shards (--shard-size), or sweep fewer values at a time"
            )
        return missing

    def run(self, missing: Sequence[Setting], at_once: int) -> SweepResult:
        self.table.save()
        self.score(self.settings)  # of models that an earlier run has left
        passes: list[Pass] = []
        for first in range(0, len(missing), max(1, at_once)):
            part = missing[first : first + at_once]
            found = merge_many(part, self.options, self.made)
            passes += found
            self.table.passes += found
            self.table.save()
            self.score(part)
        asked = [self.rows[one.label] for one in self.settings]
        best = self.table.best(asked, self.minimize) if self.evaluation is not None else None
        self.table.save()
        return SweepResult(
            rows=tuple(asked), passes=tuple(passes), apart=self.table.apart, best=best, out=self.table.folder
        )

    def made(self, setting: Setting, seconds: float) -> None:
        self.rows[setting.label].seconds = round(seconds, 3)
        self.table.save()

    def score(self, settings: Sequence[Setting]) -> None:
        """Evaluates the models that are there and have no score; deletes them if asked to."""
        if self.evaluation is None:
            return
        for setting in settings:
            if self.is_made(setting):
                if not self.is_scored(setting):
                    self.evaluate(setting, self.evaluation)
                if self.discard:
                    shutil.rmtree(os.path.realpath(setting.out))  # a link may lead to another disk

    def evaluate(self, setting: Setting, evaluation: Evaluation) -> None:
        row, started = self.rows[setting.label], time.monotonic()
        with self.display.evaluating(setting.label):
            row.score, row.tasks = evaluation(setting.out, setting.label)
        row.evaluate_seconds = round(time.monotonic() - started, 3)
        self.table.save()
        self.display.line(f"{setting.label}  score {row.score:.6g}  ({row.evaluate_seconds:.1f} s)")


def _axes(recipe: Recipe, grid: Over) -> list[Axis]:
    """The grid's axes, all with values."""
    try:
        axes = axes_of(recipe, grid)
    except RecipeError as e:
        raise RecipeError(re.sub("(?m)^over:", "grid:", str(e))) from None
    for axis in axes:
        if axis.is_range:
            raise RecipeError(f"grid: {axis.given}: list its values, as in {axis.given}={axis.low:g},{axis.high:g}")
    return axes


def _settings(recipe: Recipe, axes: Sequence[Axis], out: Path) -> tuple[list[Setting], list[Row]]:
    """Every combination, checked; the scale changes fastest."""
    settings, rows = [], []
    for values in combinations(axes):
        given = {axis.given: values[axis.name] for axis in axes}
        label = ",".join(f"{name}={value!r}" for name, value in given.items())
        own = recipe_at(recipe, axes, values)
        unscaled = recipe_at(recipe, axes, {**values, "scale": 1.0}) if "scale" in values else None
        settings.append(Setting(label=label, recipe=own, unscaled=unscaled, out=out / label))
        rows.append(Row(values=given, folder=label))
    return settings, rows
