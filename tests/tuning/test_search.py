"""Searches from recipe to best model."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import pymerge
from pymerge.errors import EvaluationError, Interrupted, NumericError, OutputError, RecipeError
from pymerge.recipe import Recipe
from tests.models import interrupted_after, read_model, same
from tests.tuning.searching import BEST, Problem, constant


def recorded(problem: Problem) -> dict[str, Any]:
    return json.loads((problem.work / "search.json").read_text())


def without_seconds(tries: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in asdict(one).items() if not k.endswith("seconds")} for one in tries]


def test_the_best_scale_is_found_and_written(problem: Problem, tmp_path: Path) -> None:
    path = problem.recipe(dtype="bfloat16")
    found = pymerge.search(path, problem.parabola, {"scaling": "0..2"}, out=tmp_path / "best")
    assert abs(found.best.values["scale"] - BEST) < 0.01 and found.best.score > -1e-4
    assert len(found.tries) == len(problem.calls) == 14 and [one.number for one in found.tries] == list(range(1, 15))
    for one, seen in zip(found.tries, problem.calls, strict=True):  # the model that was evaluated had that scale
        assert one.how == "scaled" and abs(one.values["scale"] - seen) < 3e-3  # bfloat16
        assert one.score == -((seen - BEST) ** 2)
    assert found.best.score == max(one.score for one in found.tries)
    assert found.anew == "" and len(found.updates) == 1
    # never more than one update and one try beside the record, in the end neither
    assert all(
        sorted(name.split("-")[0] for name in names) == ["search.json", "try", "update"] for names in problem.seen
    )
    assert {path.name for path in problem.work.iterdir()} <= {"search.json", "curve.png"}
    # the best is what `merge` writes at that value
    value = found.best.values["scale"]
    pymerge.Recipe.from_yaml(problem.recipe(dtype="bfloat16", parameters={"weight": 1.0, "lambda": value})).run(
        tmp_path / "merged"
    )
    for file in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "best" / file).read_bytes() == (tmp_path / "merged" / file).read_bytes()
    summary = json.loads((tmp_path / "best" / "merge.json").read_text())
    assert summary["search"]["values"] == {"scale": value} and summary["search"]["tries"] == 14
    assert "the bytes of a merge at this scale" in summary["search"]["how"]
    assert pymerge.verify(tmp_path / "best")["tensors"] == 4


def test_slices_are_searched(problem: Problem, tmp_path: Path) -> None:
    """Sources that are other models than the recipe has in all, the base among them."""
    for folder in (problem.base, *problem.models):
        (folder / "config.json").write_text(json.dumps({"model_type": "test", "num_hidden_layers": 1}))
        tensors = read_model(folder)
        save_file({n: tensors[n] for n in tensors if "layers.1" not in n}, folder / "model.safetensors")
    sources = [{"model": str(m), "layer_range": [0, 1], "parameters": {"weight": 0.5}} for m in problem.models]
    raw = {"base_model": str(problem.base), "merge_method": "task_arithmetic", "slices": [{"sources": sources}]}
    (tmp_path / "slices.yaml").write_text(json.dumps(raw))
    problem.best = 0.5 * BEST
    found = pymerge.search(
        tmp_path / "slices.yaml", problem.parabola, {"scale": [0.5, BEST, 1.0]}, out=tmp_path / "best"
    )
    assert found.best.values == {"scale": BEST} and found.anew == "it has slices or modules"
    pymerge.merge(
        problem.base, problem.models, method="task_arithmetic", weight=0.5, scale=BEST, out=tmp_path / "whole"
    )
    assert same(read_model(tmp_path / "best"), read_model(tmp_path / "whole"))


def test_models_behind_calibrate_steps_are_merged_anew(problem: Problem, tmp_path: Path) -> None:
    path = problem.recipe(calibrate="lines")
    found = pymerge.search(path, problem.parabola, {"scale": [0.5, 1.0, 2.0]}, out=tmp_path / "best")
    assert found.anew == "lines comes behind the scale" and {one.how for one in found.tries} == {"merged"}
    value = found.best.values["scale"]
    pymerge.Recipe.from_yaml(problem.recipe(calibrate="lines", parameters={"weight": 1.0, "scale": value})).run(
        tmp_path / "merged"
    )
    assert same(read_model(tmp_path / "best"), read_model(tmp_path / "merged"))
    assert json.loads((tmp_path / "best" / "merge.json").read_text())["search"]["how"] == "merged at these values"


def test_other_hyperparameters(problem: Problem) -> None:
    """`weight` is the scale of task arithmetic too, but the update is another one for each."""
    found = pymerge.search(problem.recipe(), problem.parabola, {"weight": "0.5..1.5"}, tolerance=0.05)
    assert abs(found.best.values["weight"] - BEST) < 0.05 and found.anew == "the scale is not searched"
    assert not any(name.startswith("update") for names in problem.seen for name in names)


def test_a_grid_merges_an_update_for_each_of_the_others(problem: Problem) -> None:
    over = {"lambda": [0.5, 1.0, 1.5], "weight": [0.5, 1.0]}
    found = pymerge.search(problem.recipe(), problem.parabola, over)
    assert [one.values for one in found.tries] == [
        {"weight": w, "scale": s} for w in (0.5, 1.0) for s in over["lambda"]
    ]
    for one, seen in zip(found.tries, problem.calls, strict=True):
        assert seen == pytest.approx(one.values["weight"] * one.values["scale"], abs=1e-5)
    assert found.best.values == {"weight": 0.5, "scale": 1.5} and len(found.updates) == 2


def test_losses_are_minimized(problem: Problem) -> None:
    found = pymerge.search(problem.recipe(), lambda folder: -problem.parabola(folder), {"scale": "0..1"}, minimize=True)
    assert abs(found.best.values["scale"] - BEST) < 0.01 and found.best.score < 1e-4


def test_the_best_of_all_is_kept_where_the_curve_has_two_tops(problem: Problem) -> None:
    """The first two tries lead to the left; the better of the tops was met by chance on the right."""

    def two_tops(folder: str) -> float:
        scale = problem.scale_of(folder)
        return 5.0 if abs(scale - 0.61803) < 1e-3 else 9.0 if abs(scale - 0.38197) < 1e-3 else -scale

    found = pymerge.search(problem.recipe(), two_tops, {"scale": "0..1"})
    assert found.best.values == {"scale": 0.38197} and found.best.number == 1


def test_scores_by_task_are_all_kept(problem: Problem) -> None:
    found = pymerge.search(problem.recipe(), problem.of_tasks, {"scale": [0.5, 0.8]})
    for one in found.tries:
        assert one.score == pytest.approx((one.tasks["a"] + one.tasks["b"]) / 2)
    assert recorded(problem)["tries"][1]["tasks"] == found.tries[1].tasks and recorded(problem)["best"] == 2


def test_interrupted_while_evaluating_and_continued(problem: Problem, tmp_path: Path) -> None:
    path = problem.recipe()
    whole = pymerge.search(path, problem.parabola, {"scale": "0..1"}, work=tmp_path / "whole")
    problem.calls.clear()
    problem.fails_at = 4
    with pytest.raises(Interrupted, match="4 tries are kept: the same command continues") as caught:
        pymerge.search(path, problem.parabola, {"scale": "0..1"})
    assert caught.value.exit_code == 130 and len(recorded(problem)["tries"]) == 4
    problem.fails_at = None
    found = pymerge.search(path, problem.parabola, {"scale": "0..1"})
    assert len(problem.calls) == len(whole.tries) and without_seconds(found.tries) == without_seconds(whole.tries)
    assert found.best == found.tries[whole.best.number - 1] and len(found.updates) == 1


@pytest.mark.parametrize("segments", [2, 6], ids=["update", "try"])
def test_interrupted_while_merging_and_continued(segments: int, problem: Problem) -> None:
    path = problem.recipe()
    with pytest.raises(Interrupted), interrupted_after(segments):
        pymerge.search(path, problem.parabola, {"scale": [0.5, 0.7]})
    found = pymerge.search(path, problem.parabola, {"scale": [0.5, 0.7]})
    assert problem.calls == pytest.approx([0.5, 0.7], abs=1e-6) and len(found.tries) == 2
    assert {path.name for path in problem.work.iterdir()} <= {"search.json", "curve.png"}


def test_a_wider_range_knows_the_earlier_tries(problem: Problem) -> None:
    path = problem.recipe()
    near = pymerge.search(path, problem.parabola, {"scale": [0.2, 0.4]})
    assert any("end of the range" in note for note in near.notes) is False
    wide = pymerge.search(path, problem.parabola, {"scale": [0.4, 0.8]})
    assert len(problem.calls) == 3 and [one.values["scale"] for one in wide.tries] == [0.2, 0.4, 0.8]
    assert wide.best.number == 3


def test_the_best_at_an_end_is_noted(problem: Problem) -> None:
    found = pymerge.search(problem.recipe(), problem.parabola, {"scale": "0..0.5"})
    assert any("the best is at an end of the range of scale" in note for note in found.notes)


def test_another_search_is_refused(problem: Problem, tmp_path: Path) -> None:
    path, over = problem.recipe(), {"scale": [0.5, 0.7]}
    pymerge.search(path, problem.parabola, over)
    with pytest.raises(OutputError, match="2 tries of another search: .*evaluation.name.*--restart"):
        pymerge.search(path, problem.of_tasks, over)
    with pytest.raises(OutputError, match="recipe.exclude"):
        pymerge.search(problem.recipe(exclude=["embed*"]), problem.parabola, over)
    os.utime(problem.base / "model.safetensors", ns=(1, 1))
    with pytest.raises(OutputError, match=r"model.safetensors has changed \(time of change\)"):
        pymerge.search(problem.recipe(), problem.parabola, over)
    assert len(problem.calls) == 2
    found = pymerge.search(problem.recipe(), problem.parabola, over, restart=True)
    assert len(problem.calls) == 4 and [one.number for one in found.tries] == [1, 2]


def test_a_changed_evaluation_file_is_refused(problem: Problem, tmp_path: Path) -> None:
    file = tmp_path / "score.py"
    file.write_text("def of(folder):\n    return 1\n")
    pymerge.search(problem.recipe(), f"{file}:of", {"scale": [0.5]})
    file.write_text("def of(folder):\n    return 2\n")
    with pytest.raises(OutputError, match="evaluation.digest"):
        pymerge.search(problem.recipe(), f"{file}:of", {"scale": [0.5]})


def test_places_that_are_taken_are_refused_first(problem: Problem, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "try-notes.txt").write_text("")
    with pytest.raises(OutputError, match="not of a search"):
        pymerge.search(problem.recipe(), problem.parabola, {"scale": [1]}, work=tmp_path / "mine")
    with pytest.raises(OutputError, match="the search deletes what has such a name"):
        pymerge.search(problem.recipe(), problem.parabola, {"scale": [1]}, out=problem.work / "try-best")
    with pytest.raises(OutputError, match="is not empty"):
        pymerge.search(problem.recipe(), problem.parabola, {"scale": [1]}, out=tmp_path / "mine")
    with pytest.raises(OutputError, match="inputs are never changed"):
        pymerge.search(problem.recipe(), problem.parabola, {"scale": [1]}, work=problem.base / "work")
    for work in ("best", "best/work"):
        with pytest.raises(OutputError, match="the tries are kept in"):
            here = {"out": tmp_path / "best", "work": tmp_path / work}
            pymerge.search(problem.recipe(), problem.parabola, {"scale": [1]}, **here)
    assert problem.calls == [] and not problem.work.exists()


def test_one_search_a_folder(problem: Problem) -> None:
    problem.work.mkdir()
    fd = os.open(problem.work, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match="another search works there now"):
        pymerge.search(problem.recipe(), problem.parabola, {"scale": [1]})
    os.close(fd)


def test_a_failing_evaluation_is_kept_and_continued(problem: Problem) -> None:
    path = problem.recipe()
    problem.fails_at, problem.failure = 1, ZeroDivisionError("no")
    with pytest.raises(EvaluationError, match=r"try 2 \(scale=0.7\): .*ZeroDivisionError: no"):
        pymerge.search(path, problem.parabola, {"scale": [0.5, 0.7]})
    assert "in parabola" in recorded(problem)["failure"] and len(recorded(problem)["tries"]) == 1
    problem.fails_at = None
    pymerge.search(path, problem.parabola, {"scale": [0.5, 0.7]})
    assert recorded(problem)["failure"] == "" and len(problem.calls) == 2


def test_tasks_must_stay_the_same(problem: Problem) -> None:
    answers = iter([{"a": 1.0}, {"a": 1.0, "b": 2.0}])
    with pytest.raises(EvaluationError, match="try 2 .* gave a, b, in earlier tries a"):
        pymerge.search(problem.recipe(), lambda folder: next(answers), {"scale": [0.5, 0.7]})


def test_a_merge_that_overflows_says_at_which_value(problem: Problem) -> None:
    with pytest.raises(NumericError, match=r"try 2 \(scale=1e\+06\): .*do not fit F16"):
        pymerge.search(problem.recipe(out_dtype="float16"), constant(1.0), {"scale": [1, 1e6]})


def test_permutations_in_memory_are_refused(problem: Problem) -> None:
    given = [str(model) for model in problem.models]
    recipe = Recipe.from_kwargs(str(problem.base), given, "task_arithmetic", align=object())
    with pytest.raises(RecipeError, match="permutations and samples must be files"):
        pymerge.search(recipe, problem.parabola, {"scale": [1]}, work=problem.work)


def test_refused_before_anything_is_merged(problem: Problem) -> None:
    path = problem.recipe()
    for tolerance in (1.0, 1e-5, 0.0):
        with pytest.raises(RecipeError, match="tolerance: must be at least 0.0001 and below the width of the range, 1"):
            pymerge.search(path, problem.parabola, {"scale": "0..1"}, tolerance=tolerance)
    with pytest.raises(RecipeError, match="epsilon: density 0.9"):  # no such pair of values
        over = {"density": [0.5, 0.9], "epsilon": [0.2]}
        pymerge.search(problem.recipe(merge_method="della_linear"), problem.parabola, over)
    base, models = read_model(problem.base), [read_model(model) for model in problem.models]
    with pytest.raises(RecipeError, match="models must be folders"):
        pymerge.search(pymerge.Recipe.from_kwargs(base, models, "task_arithmetic"), constant(1), {"scale": [1]})
    with pytest.raises(RecipeError, match="say where the tries are kept"):
        pymerge.search(pymerge.Recipe.from_yaml(path), constant(1), {"scale": [1]})
    assert problem.calls == [] and not problem.work.exists()
