"""Sweeps from recipe to folders, table and scores."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import pymerge
from pymerge.cli import app
from pymerge.errors import EvaluationError, Interrupted, OutputError, RecipeError
from pymerge.tuning import grid as module
from tests.models import read_model, same
from tests.tuning.searching import Problem

TIES: dict[str, Any] = {"merge_method": "ties", "parameters": {"weight": 1.0, "density": 0.5}}
GRID = {"density": [0.1, 0.6], "lambda": "0.5,1"}
FOLDERS = ["density=0.1,lambda=0.5", "density=0.1,lambda=1.0", "density=0.6,lambda=0.5", "density=0.6,lambda=1.0"]


def table_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "sweep.json").read_text())


def folders(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if path.is_dir())


def counted(problem: Problem) -> Any:
    """An evaluation that knows which folders it was called with."""

    def score(folder: str) -> float:
        problem.seen.append({path.name for path in Path(folder).parent.iterdir() if path.is_dir()})
        if len(problem.calls) == problem.fails_at:
            raise problem.failure
        problem.calls.append(float(read_model(Path(folder))["layers.1.norm"].norm()))
        return problem.calls[-1]

    return score


def test_every_combination_has_the_folder_of_a_merge(problem: Problem, tmp_path: Path) -> None:
    recipe = problem.recipe(**TIES)
    found = CliRunner().invoke(
        app,
        ["sweep", str(recipe), "--grid", "density=0.1,0.6", "--grid", "lambda=0.5,1", "--out", str(tmp_path / "out")],
    )
    assert found.exit_code == 0, found.output
    assert folders(tmp_path / "out") == FOLDERS
    table = table_of(tmp_path / "out")
    assert [row["folder"] for row in table["settings"]] == FOLDERS and len(table["passes"]) == 1
    assert "4 model(s) of one pass" in found.output
    for row in table["settings"]:
        problem.recipe(**TIES | {"parameters": {"weight": 1.0} | row["values"]})
        alone = tmp_path / "alone" / row["folder"]
        assert CliRunner().invoke(app, ["merge", str(recipe), str(alone)]).exit_code == 0
        assert same(read_model(alone), read_model(tmp_path / "out" / row["folder"]))
        assert pymerge.verify(tmp_path / "out" / row["folder"])["tensors"] == 4


def test_inputs_are_read_once(problem: Problem, tmp_path: Path) -> None:
    found = pymerge.sweep(problem.recipe(**TIES), GRID, out=tmp_path / "out")
    inputs = sum(f.stat().st_size for p in (problem.base, *problem.models) for f in p.glob("*.safetensors"))
    (one,) = found.passes
    assert one.outputs == 4 and 0.7 * inputs < one.read <= inputs  # headers are not counted


def test_scores_come_into_the_table(problem: Problem, tmp_path: Path) -> None:
    recipe, score = problem.recipe(**TIES), counted(problem)
    found = pymerge.sweep(recipe, GRID, out=tmp_path / "out", evaluate=score)
    assert [row.score for row in found.rows] == problem.calls and len(set(problem.calls)) == 4
    assert found.best is not None and found.best.score == max(problem.calls)
    assert table_of(tmp_path / "out")["best"] == found.best.folder
    assert folders(tmp_path / "out") == FOLDERS
    # more values: what is there is neither merged nor evaluated again, and stays in the table
    more = pymerge.sweep(recipe, {"density": [0.6, 0.8], "lambda": [0.5]}, out=tmp_path / "out", evaluate=score)
    assert [one.outputs for one in more.passes] == [1] and len(problem.calls) == 5
    assert len(table_of(tmp_path / "out")["settings"]) == 5
    again = pymerge.sweep(recipe, GRID, out=tmp_path / "out", evaluate=score, minimize=True)
    assert not again.passes and len(problem.calls) == 5
    assert again.best is not None and again.best.score == min(problem.calls)


def test_scores_of_another_evaluation_are_forgotten(problem: Problem, tmp_path: Path) -> None:
    recipe = problem.recipe(**TIES)
    pymerge.sweep(recipe, GRID, out=tmp_path / "out", evaluate=counted(problem))
    found = pymerge.sweep(recipe, GRID, out=tmp_path / "out", evaluate=constant)
    assert [row.score for row in found.rows] == [7.0] * 4 and not found.passes


def constant(folder: str) -> float:
    return 7.0


def test_discarded_models_are_made_as_the_disk_has_room(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(f.stat().st_size for f in problem.base.glob("*.safetensors"))
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(int(2.9 * size)))
    found = pymerge.sweep(problem.recipe(**TIES), GRID, out=tmp_path / "out", evaluate=counted(problem), discard=True)
    assert [one.outputs for one in found.passes] == [2, 2] and all(len(names) <= 2 for names in problem.seen)
    assert folders(tmp_path / "out") == [] and [row.score for row in found.rows] == problem.calls
    again = pymerge.sweep(problem.recipe(**TIES), GRID, out=tmp_path / "out", evaluate=counted(problem), discard=True)
    assert not again.passes and len(problem.calls) == 4


def test_an_interrupted_evaluation_is_continued(problem: Problem, tmp_path: Path) -> None:
    recipe, problem.fails_at = problem.recipe(**TIES), 2
    with pytest.raises(Interrupted):
        pymerge.sweep(recipe, GRID, out=tmp_path / "out", evaluate=counted(problem), discard=True)
    assert folders(tmp_path / "out") == FOLDERS[2:]
    problem.fails_at = None
    found = pymerge.sweep(recipe, GRID, out=tmp_path / "out", evaluate=counted(problem), discard=True)
    assert not found.passes and [row.score for row in found.rows] == problem.calls
    assert len(set(problem.calls)) == 4 and folders(tmp_path / "out") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_while_evaluating(number: signal.Signals, problem: Problem, tmp_path: Path) -> None:
    found = signal.getsignal(number)
    before = signal.default_int_handler if number == signal.SIGINT else found  # shells ignore it in the background
    signal.signal(number, before)

    def stop(folder: str) -> float:
        os.kill(os.getpid(), number)
        raise AssertionError("the signal came too late")

    for run in (
        lambda: pymerge.sweep(problem.recipe(**TIES), GRID, out=tmp_path / "out", evaluate=stop),
        lambda: pymerge.search(problem.recipe(), stop, {"scale": [0.5, 0.7]}),
    ):
        with pytest.raises(Interrupted, match="kept: the same command continues") as caught:
            run()
        assert caught.value.exit_code == 128 + number and signal.getsignal(number) == before
    signal.signal(number, found)


def test_a_failed_evaluation_leaves_the_models(problem: Problem, tmp_path: Path) -> None:
    problem.fails_at, problem.failure = 1, ValueError("no data")
    with pytest.raises(EvaluationError, match=r"density=0.1,lambda=1.0: .*no data"):
        pymerge.sweep(problem.recipe(**TIES), GRID, out=tmp_path / "out", evaluate=counted(problem))
    assert folders(tmp_path / "out") == FOLDERS and table_of(tmp_path / "out")["settings"][0]["score"] is not None


def test_too_small_a_disk_is_said_before_anything_is_merged(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: namedtuple("usage", "free")(100))
    with pytest.raises(OutputError, match="writes 4 models of 0.00 GB, .* --discard"):
        pymerge.sweep(problem.recipe(**TIES), GRID, out=tmp_path / "out")
    assert folders(tmp_path / "out") == []


def test_too_many_open_files(problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.resource, "getrlimit", lambda which: (module.FILES + 8, 100))
    with pytest.raises(OutputError, match="4 models keeps 12 files open, 8 are left: .*ulimit"):
        pymerge.sweep(problem.recipe(**TIES), GRID, out=tmp_path / "out")
    found = pymerge.sweep(problem.recipe(**TIES), GRID, out=tmp_path / "out", evaluate=constant, discard=True)
    assert [one.outputs for one in found.passes] == [2, 2]


def test_what_lies_in_the_folder_is_kept(problem: Problem, tmp_path: Path) -> None:
    recipe, out = problem.recipe(**TIES), tmp_path / "out"
    shutil.copytree(problem.base, out / FOLDERS[1])
    with pytest.raises(OutputError, match="holds a model already"):
        pymerge.sweep(recipe, GRID, out=out)
    assert folders(out) == [FOLDERS[1]] and same(read_model(out / FOLDERS[1]), read_model(problem.base))
    pymerge.sweep(recipe, GRID, out=out, options=pymerge.Options(overwrite=True))
    assert folders(out) == FOLDERS and not same(read_model(out / FOLDERS[1]), read_model(problem.base))
    with pytest.raises(OutputError, match="of another sweep: recipe.seed: was .*, is now 7"):
        pymerge.sweep(problem.recipe(**TIES, seed=7), GRID, out=out)
    with pytest.raises(OutputError, match="inputs are never changed"):
        pymerge.sweep(recipe, GRID, out=problem.base)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"models": [1, 2]}, "grid: unknown hyperparameter 'models'"),
        ({"base_model": [1, 2]}, "grid: unknown hyperparameter 'base_model'"),
        ({"density": "0.1..0.5"}, "grid: density: list its values, as in density=0.1,0.5"),
        ({"density": [2.0]}, "grid: density: "),
        (["density"], "grid: expected hyperparameters with their values, {name: values}, got"),
        ({"scale": [1], "lambda": [1]}, "grid: scale is given twice"),
    ],
)
def test_grids_that_cannot_be(grid: Any, message: str, problem: Problem, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        pymerge.sweep(problem.recipe(**TIES), grid, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_discarding_without_an_evaluation(problem: Problem, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="discard: models are deleted when they have been evaluated"):
        pymerge.sweep(problem.recipe(**TIES), GRID, out=tmp_path / "out", discard=True)


@pytest.mark.parametrize("command", ["sweep", "search"])
def test_folders_that_cannot_be_made(command: str, problem: Problem, tmp_path: Path) -> None:
    recipe, score = str(problem.recipe(**TIES)), tmp_path / "score.py"
    score.write_text("def one(folder):\n    return 1.0\n")
    ends = {"sweep": ["--grid", "density=0.1", "--out"], "search": ["--over", "density=0.1", "--work"]}[command]
    for where in (recipe, "/proc/not/here"):
        found = CliRunner().invoke(app, [command, recipe, "--eval", f"{score}:one", *ends, where])
        assert found.exit_code == 5 and "OutputError" in found.output, found.output


def test_a_linked_model_is_discarded(problem: Problem, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other disk"
    out.mkdir()
    other.mkdir()
    (out / "density=0.1").symlink_to(other)
    found = pymerge.sweep(problem.recipe(**TIES), {"density": [0.1]}, out=out, evaluate=counted(problem), discard=True)
    assert found.rows[0].score is not None and not other.exists()


def test_a_model_without_its_weights_is_not_done(problem: Problem, tmp_path: Path) -> None:
    recipe, out = problem.recipe(**TIES), tmp_path / "out"
    assert [one.outputs for one in pymerge.sweep(recipe, GRID, out=out).passes] == [4]
    assert pymerge.sweep(recipe, GRID, out=out).passes == ()
    weights = out / FOLDERS[0] / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    with pytest.raises(OutputError, match="holds a model already"):
        pymerge.sweep(recipe, GRID, out=out)
    found = pymerge.sweep(recipe, GRID, out=out, options=pymerge.Options(overwrite=True))
    assert [one.outputs for one in found.passes] == [1] and weights.read_bytes() == whole


def test_a_sweep_that_never_began_leaves_the_folder_to_others(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(module, "merge_many", lambda *_: (_ for _ in ()).throw(OutputError("disk")))
        with pytest.raises(OutputError, match="disk"):
            pymerge.sweep(problem.recipe(**TIES), GRID, out=out)
    pymerge.sweep(problem.recipe(**TIES, seed=7), {"density": [0.1]}, out=out)
    assert [row["folder"] for row in table_of(out)["settings"]] == ["density=0.1"]


def test_the_best_is_one_of_the_asked_and_stays(problem: Problem, tmp_path: Path) -> None:
    recipe, out, score = problem.recipe(**TIES), tmp_path / "out", counted(problem)
    first = pymerge.sweep(recipe, GRID, out=out, evaluate=score)
    assert first.best is not None
    pymerge.sweep(recipe, GRID, out=out)
    assert table_of(out)["best"] == first.best.folder and table_of(out)["minimize"] is False
    others = {"density": [0.1 if first.best.values["density"] == 0.6 else 0.6], "lambda": [0.5, 1.0]}
    second = pymerge.sweep(recipe, others, out=out, evaluate=score)
    assert second.best in second.rows and second.best.score == max(row.score or 0.0 for row in second.rows)
    assert table_of(out)["best"] == second.best.folder != first.best.folder


def test_a_model_is_no_folder_of_a_sweep(problem: Problem, tmp_path: Path) -> None:
    shutil.copytree(problem.base, tmp_path / "out")
    with pytest.raises(OutputError, match="holds a model, and no sweep"):
        pymerge.sweep(problem.recipe(**TIES), GRID, out=tmp_path / "out")
    assert folders(tmp_path / "out") == []


def test_a_report_is_of_one_model_of_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    found = CliRunner().invoke(app, ["report", str(tmp_path), "-o", str(tmp_path / "report.html")])
    assert found.exit_code == 3 and "report one of its folders" in " ".join(found.output.split()), found.output


def test_a_grid_without_values_is_told_what_a_grid_takes(problem: Problem, tmp_path: Path) -> None:
    line = ["sweep", str(problem.recipe(**TIES)), "--grid", "density", "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(app, line)
    assert found.exit_code == 2 and "NAME=VALUE,VALUE" in found.output and "LOW" not in found.output, found.output
