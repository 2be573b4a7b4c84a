from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pymerge.errors import RecipeError
from pymerge.recipe import Recipe
from pymerge.tuning.over import axes_of, parse_overs, recipe_at


def recipe(method: str = "task_arithmetic", **keys: Any) -> Recipe:
    raw = {"base_model": "b", "models": [{"model": "m"}, {"model": "n"}], "merge_method": method}
    return Recipe.from_dict(raw | {"parameters": {"weight": 1.0}} | keys, models_must_exist=False)


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "bmn":
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["scale", "lambda", "scaling", "task_arithmetic.lambda"])
def test_names_of_the_overall_coefficient(name: str) -> None:
    steps = recipe(calibrate="lines", parameters={"weight": 1.0, "lambda": 0.7})
    (axis,) = axes_of(steps, {name: "0.5..1.5"})
    assert (axis.name, axis.is_scale, axis.is_range, axis.low, axis.high) == ("scale", True, True, 0.5, 1.5)
    found = recipe_at(steps, [axis], {"scale": 0.9}).to_dict()
    assert found["parameters"] == {"weight": 1.0, "scale": 0.9}
    assert found == steps.to_dict() | {"parameters": {"weight": 1.0, "scale": 0.9}}


def test_numbers_of_every_step() -> None:
    steps = recipe("ties", purify=[{"method": "dare", "density": 0.5}], calibrate="lines")
    over = {"ties.density": [0.1, 0.2], "dare.density": "0.3,0.4", "lines.scale": "2", "lines.b": [1.0]}
    axes = axes_of(steps, over)
    assert [axis.name for axis in axes] == ["density", "dare.density", "lines.scale", "lines.b"]
    found = recipe_at(steps, axes, {"density": 0.1, "dare.density": 0.4, "lines.scale": 2.0, "lines.b": 1.0}).to_dict()
    assert found["parameters"]["density"] == 0.1
    assert found["purify"] == [{"method": "dare", "density": 0.4}]
    assert found["calibrate"] == [{"method": "lines", "scale": 2.0, "b": 1.0}]


def test_the_scale_comes_last_and_whole_numbers_are_listed() -> None:
    axes = axes_of(recipe("consensus", parameters={}), {"scale": [1, 2], "k": "1..3"})
    assert [(axis.name, axis.values) for axis in axes] == [("k", (1, 2, 3)), ("scale", (1.0, 2.0))]


def test_values_of_a_range_are_rounded() -> None:
    (axis,) = axes_of(recipe(), {"scale": "0.5..1.5"})
    assert axis.rounded(0.88196601125) == 0.88197
    (axis,) = axes_of(recipe(), {"scale": "0..0.001"})
    assert axis.rounded(0.000381966) == 0.00038197


WRONG = {
    "scalng=0..1": "unknown hyperparameter 'scalng': did you mean .*scaling",
    "densty=0..1": "unknown hyperparameter 'densty'",
    "xyz=0..1": "known: weight, scale, lambda, scaling$",
    "ties.scale=0..1": "did you mean .*task_arithmetic.scale|known: task_arithmetic.weight",
    "scale=1..0.5": "the range 1..0.5 is empty: its low end must be below its high end",
    "scale=1..1": "the range 1..1 is empty",
    "scale=..": "must be a finite number, got ''",
    "scale=0..1..2": "expected LOW..HIGH",
    "scale=,": "no values",
    "scale=a..b": "must be a finite number, got 'a'",
    "normalize=0,1": "normalize is no number",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=WRONG)
def test_wrong(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        axes_of(recipe(), parse_overs([text]))


def test_one_value_from_python_is_no_list() -> None:
    with pytest.raises(RecipeError, match=r"scale: expected LOW..HIGH or a list of values, got 0.5"):
        axes_of(recipe(), {"scale": 0.5})  # pyright: ignore[reportArgumentType]


def test_outside_of_the_hyperparameters_range() -> None:
    with pytest.raises(RecipeError, match=r"density: must be in \[0, 1\], got '1.5'"):
        axes_of(recipe("ties"), {"density": "0.5..1.5"})


def test_all_problems_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        axes_of(recipe("ties"), {"scale": "1..0", "densty": "0..1"})
    assert len(str(caught.value).splitlines()) == 2


def test_what_is_given_model_by_model_is_refused() -> None:
    own = [{"model": "m", "parameters": {"weight": 0.5}}, {"model": "n"}]
    with pytest.raises(RecipeError, match=r"weight is given model by model \(m\)"):
        axes_of(recipe(models=own), {"weight": "0..1"})
    rows = [{"method": "trim", "per_model": {"density": [0.1, 0.2]}}]
    with pytest.raises(RecipeError, match="trim.density is given model by model"):
        axes_of(recipe(purify=rows), {"trim.density": "0..1"})


@pytest.mark.parametrize("value", [[0.1, 0.5], [{"filter": "mlp", "value": 0.3}, {"value": 0.5}]], ids=str)
def test_what_is_given_layer_by_layer_is_refused(value: Any) -> None:
    with pytest.raises(RecipeError, match="scale is given by layer or tensor"):
        axes_of(recipe(parameters={"weight": 1.0, "lambda": value}), {"scale": "0..1"})


def test_names_that_two_steps_have() -> None:
    steps = recipe("ties", purify=[{"method": "dare", "density": 0.5}])
    with pytest.raises(RecipeError, match="density: say which: ties.density or dare.density"):
        axes_of(steps, {"density": "0..1"})
    (axis,) = axes_of(steps, {"dare.density": "0.1..0.9"})
    assert (axis.name, axis.key) == ("dare.density", "purify")


@pytest.mark.parametrize("texts", [["scale"], ["=0..1"], ["scale="], ["scale=0..1", "scale=2"]])
def test_unreadable(texts: list[str]) -> None:
    with pytest.raises(RecipeError, match="over: "):
        parse_overs(texts)


def test_synonyms_are_one_name() -> None:
    with pytest.raises(RecipeError, match="scale is given twice"):
        axes_of(recipe(), {"scale": [1, 2], "lambda": [1, 2]})


def test_a_range_is_alone() -> None:
    with pytest.raises(RecipeError, match="a range is searched alone: list the values of scale, as in scale="):
        axes_of(recipe("ties"), {"scale": "0..1", "density": [0.1, 0.2]})
    with pytest.raises(RecipeError, match="nothing to search over"):
        axes_of(recipe("ties"), {})
