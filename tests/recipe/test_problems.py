"""Faults S38, S46, S47: one RecipeError with every problem and the nearest valid names."""

from __future__ import annotations

from typing import Any

import pytest

from pymerge.errors import RecipeError
from pymerge.recipe import Recipe


def raw(**keys: Any) -> dict[str, Any]:
    models = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 1}}]
    return {"base_model": "base", "models": models, "merge_method": "ties"} | keys


def problems(data: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(data)
    assert caught.value.exit_code == 2
    lines = str(caught.value).splitlines()
    return [lines[0].removeprefix("recipe: ")] if len(lines) == 1 else [line.removeprefix("  - ") for line in lines[1:]]


def test_all_problems_in_one_message() -> None:
    data = {
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"wieght": 1, "densty": 0.5, "normalize": True}},
            {"model": "b", "paramters": {}},
        ],
        "merge_method": "ties",
        "merge_metod": "ties",
        "nomralize": True,
        "parameters": {"density": 2, "lambda": "x", "weight": 1},
        "dtype": "bf16",
        "purify": {"method": "dare", "density": -1},
        "relax": {"missing": "bse"},
        "seed": -1,
        "style": "author",
    }
    assert problems(data) == [
        "unknown key 'merge_metod': did you mean merge_method?",
        "unknown key 'nomralize': did you mean normalize? Hyperparameters go under `parameters`",
        "style: must be one of authors, mergekit, mergekit-0.1.4, got 'author'",
        "models[0] (a): unknown hyperparameter 'wieght': did you mean weight?",
        "models[0] (a): unknown hyperparameter 'densty': did you mean density?",
        "models[0] (a): normalize has one value for the whole merge: move it to the recipe's parameters",
        "models[1]: unknown key 'paramters': did you mean parameters?",
        "parameters: density: must be in [0, 1], got 2",
        "parameters: lambda: must be a finite number, got 'x'",
        "purify: density: must be in [0, 1], got -1",
        "dtype: unknown dtype 'bf16': did you mean bfloat16 or float16 or float64?",
        "seed: must be a whole number from 0 to 2^63 - 1, got -1",
        "relax: missing: must be base or skip, got 'bse'",
    ]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("dare-ties", "dare_ties"),
        ("Ties", "ties"),
        ("task_arithmatic", "task_arithmetic"),
        ("liner", "linear"),
        ("pymerge_tsv_m", "tsv_m"),
    ],
)
def test_unknown_method_names_the_nearest(name: str, hint: str) -> None:
    assert problems(raw(merge_method=name))[0].startswith(f"merge_method: unknown method '{name}': did you mean {hint}")


@pytest.mark.parametrize("value", [2, -1, float("nan"), float("inf"), "nan", True, "half", 1e999])
def test_out_of_range(value: Any) -> None:
    assert problems(raw(parameters={"density": value})) == [f"parameters: density: must be in [0, 1], got {value!r}"]
    assert problems(raw(parameters={"density": [0.5, value]})) == [
        f"parameters: density: must be in [0, 1], got {value!r}"
    ]
    filtered = [{"filter": "mlp", "value": value}, {"value": 0.5}]
    assert problems(raw(parameters={"density": filtered})) == [
        f"parameters: density[0]: must be in [0, 1], got {value!r}"
    ]


def test_slerp_t_range_and_presence() -> None:
    models = [{"model": "a"}]
    data = {"base_model": "base", "models": models, "merge_method": "slerp"}
    assert problems(data | {"parameters": {"t": 1.5}}) == ["parameters: t: must be in [0, 1], got 1.5"]
    assert problems(data)[0].startswith("slerp: t: must be given (in [0, 1]")


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "dare_linear", "breadcrumbs"])
def test_weights_that_sum_to_zero_cannot_be_normalised(method: str) -> None:
    models = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": -1}}]
    data = {"models": models, "merge_method": method, "parameters": {"normalize": True}}
    data |= {} if method == "linear" else {"base_model": "base"}
    assert problems(data) == [
        f"{method}: weight: the weights sum to 0, which cannot be normalised: change a weight or set normalize: false"
    ]
    assert Recipe.from_dict(data | {"parameters": {"normalize": False}}).method == method


def test_weights_that_sum_to_zero_in_one_layer_are_found_before_the_merge() -> None:
    models = [{"model": "a", "parameters": {"weight": [1, -1]}}, {"model": "b", "parameters": {"weight": 1}}]
    recipe = Recipe.from_dict({"models": models, "merge_method": "linear"})
    with pytest.raises(RecipeError, match=r"layers.1.w.weight: linear: weight: the weights sum to 0"):
        recipe.resolve(["layers.0.w.weight", "layers.1.w.weight"])


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf"), ".nan"])
def test_weights_must_be_finite(weight: Any) -> None:
    models = [{"model": "a", "parameters": {"weight": weight}}]
    expected = f"models[0] (a): weight: must be a finite number, got {weight!r}"
    assert problems(raw(models=models))[0] == expected


def test_steps_in_the_wrong_place() -> None:
    no_base = {"base_model": None, "merge_method": "linear"}
    needs = "linear merges whole weights"
    assert problems(raw(**no_base, purify="dare")) == [f"purify: {needs}, purify steps need task vectors"]
    assert problems(raw(**no_base, calibrate="lines")) == [f"calibrate: {needs}, calibrate steps need a merged update"]
    assert problems(raw(merge_method="dare")) == ["merge_method: dare is a purify step: write purify: dare"]
    assert problems(raw(purify=["ties"])) == ["purify[0]: ties is a combine step: write merge_method: ties"]
    assert problems(raw(calibrate="linse")) == ["calibrate: unknown method 'linse': did you mean lines?"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"merge_method": "dare_linear", "parameters": {"density": 0.5}, "purify": "dare"}, "two random masks"),
        ({"parameters": {"density": 0.5}, "purify": "trim"}, "two magnitude selections"),
        ({"purify": ["trim", {"method": "trim", "density": 0.5}]}, "two magnitude selections"),
        ({"purify": ["dare", "dare"]}, "two random masks"),
        ({"parameters": {"density": 0.5, "rescale": True}, "purify": "dare"}, "two rescalings"),
        ({"parameters": {"density": 0.5}, "purify": {"method": "dare", "style": "mergekit"}}, "L1 rescale"),
        ({"merge_method": "linear", "base_model": None, "purify": "dare"}, "purify steps need task vectors"),
    ],
)
def test_steps_that_do_not_go_together(keys: dict[str, Any], message: str) -> None:
    found = problems({k: v for k, v in raw(**keys).items() if v is not None})
    assert len(found) == 1 and message in found[0]


def test_lambda_and_scale_are_one() -> None:
    assert Recipe.from_dict(raw(parameters={"lambda": 0.5})) == Recipe.from_dict(raw(parameters={"scale": 0.5}))
    assert problems(raw(parameters={"lambda": 1, "scale": 1}))[0].startswith("parameters: lambda and scale are two")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "a recipe is a mapping"),
        ({}, "merge_method: must be given"),
        ({"merge_method": "ties"}, "models: must be a list"),
        (raw(models=[]), "models: must be a list"),
        (raw(models=["a"]), r"models[0]: must be {model: PATH"),
        (raw(models=[{"model": 3}]), "models[0]: must be the path of a model, got 3"),
        (raw(models=[{"model": "base"}]), "ties merges at least 1 beside the base, got 0"),
        (raw(base_model=None), "base_model: must be given: ties needs a base"),
        (raw(parameters=[1]), "parameters must be a mapping"),
        (raw(parameters={"density": [{"filter": 1, "value": 1}]}), "filter must be text"),
        (raw(parameters={"density": [{"filtre": "a", "value": 1}]}), "unknown key 'filtre': did you mean filter?"),
        (raw(parameters={"density": [{"filter": "a"}]}), "has no value"),
        (raw(parameters={"density": [0.5, {"value": 1}]}), "must be in [0, 1], got {'value': 1}"),
        (raw(exclude=[1]), "exclude: must be a list of name patterns"),
        (raw(strict="no"), "strict: must be true or false"),
        (raw(relax=["missing"]), "relax: must be a mapping"),
        (raw(style="authors", parameters={"normalize": True}), "normalize: has no meaning in style authors"),
        (raw(merge_method="breadcrumbs_ties", style="authors"), "style: breadcrumbs_ties has mergekit"),
        (raw(purify={"density": 0.5}), "purify: must be the name of a method"),
        (raw(purify={"method": "trim", "style": "authors"}), "trim has no style 'authors', it has none"),
        (raw(purify={"method": "trim", "per_model": {"density": [0.5]}}), "has 1 entries for 2 models"),
    ],
)
def test_malformed(data: Any, message: str) -> None:
    assert any(message in line for line in problems(data)), problems(data)


def test_a_base_that_is_one_model_too_many_is_counted_by_name() -> None:
    one = {"merge_method": "passthrough", "base_model": "base", "models": [{"model": "a"}]}
    assert problems(one) == ["models: passthrough merges 1, got 2 with base_model"]
