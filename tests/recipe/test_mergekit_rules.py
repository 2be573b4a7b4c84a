"""The rules for `models:` configurations; each expected value agrees with a run of mergekit 0.1.5 (4 layers)."""

from __future__ import annotations

from typing import Any

import pytest

from pymerge.errors import RecipeError
from pymerge.recipe import Recipe, layer_positions

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(4) for part in ("self_attn.q_proj", "mlp.up_proj")),
    "model.norm.weight",
    "lm_head.weight",
]
EMBED, NORM, HEAD = NAMES[0], NAMES[-2], NAMES[-1]
POSITIONS = layer_positions(NAMES)


def recipe(method: str, a: Any = None, b: Any = None, parameters: Any = None, **keys: Any) -> Recipe:
    models = [{"model": "a", "parameters": a}, {"model": "b", "parameters": b}]
    raw = {"base_model": "base", "models": models, "merge_method": method, "parameters": parameters} | keys
    return Recipe.from_dict(raw)


def value(r: Recipe, name: str, field: str) -> Any:
    return getattr(r.steps_for(name, POSITIONS[name]).combine, field)


def attention(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.q_proj.weight"


def mlp(layer: int) -> str:
    return f"model.layers.{layer}.mlp.up_proj.weight"


def test_gradient_is_interpolated_over_layers_and_starts_at_its_first_entry_outside() -> None:
    r = recipe("task_arithmetic", {"weight": [0, 0.5, 2.0]}, {"weight": 0.3}, {"lambda": "1e0"})
    assert [value(r, attention(i), "weight")[0] for i in range(4)] == pytest.approx([0.0, 1 / 3, 1.0, 2.0], abs=1e-15)
    assert [value(r, n, "weight") for n in (EMBED, NORM, HEAD)] == [(0.0, 0.3)] * 3


def test_gradient_is_exact_at_its_knots() -> None:
    r = recipe("task_arithmetic", {"weight": [0.1, 0.7, 0.2, 0.9]}, {"weight": 1})
    assert [value(r, mlp(i), "weight")[0] for i in range(4)] == [0.1, 0.7, 0.2, 0.9]


def test_boolean_gradient_picks_an_entry() -> None:
    r = recipe("ties", {"weight": 1}, {"weight": 0.5}, {"normalize": [True, False, True]})
    assert [value(r, mlp(i), "normalize") for i in range(4)] == [True, True, False, True]
    assert value(r, HEAD, "normalize") is True


def test_first_fitting_filter_wins() -> None:
    weight = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": 0.5}, {"value": 0.1}]
    r = recipe(
        "task_arithmetic", {"weight": weight}, {"weight": [{"filter": "q_proj", "value": 0.9}]}, {"weight": 0.25}
    )
    assert [value(r, attention(i), "weight") for i in (0, 3)] == [(0.0, 0.9), (1.0, 0.9)]
    assert value(r, mlp(2), "weight") == (0.5, 0.25)
    assert value(r, HEAD, "weight") == (0.1, 0.25)


def test_star_fits_all_and_a_filter_is_no_pattern() -> None:
    star = [{"filter": "*", "value": 0.4}, {"filter": "mlp", "value": 9}]
    literal = [{"filter": "mlp*", "value": 1}, {"value": 0.5}]
    r = recipe("task_arithmetic", {"weight": star}, {"weight": literal})
    assert value(r, mlp(1), "weight") == (0.4, 0.5)


def test_a_single_condition_needs_no_list() -> None:
    r = recipe(
        "task_arithmetic", {"weight": {"value": [1, 0]}}, {"weight": {"filter": "mlp", "value": 2}}, {"weight": 3}
    )
    assert value(r, mlp(3), "weight") == (0.0, 2.0)
    assert value(r, attention(0), "weight") == (1.0, 3.0)


def test_model_value_before_global_value_before_default() -> None:
    r = recipe("ties", {"weight": 1, "density": 0.5}, {"weight": 0.5}, {"density": 0.3, "lambda": 0.7})
    assert value(r, HEAD, "density") == (0.5, 0.3)
    assert value(recipe("ties", {"weight": 1}, {"weight": 1}), HEAD, "density") == (1.0, 1.0)


@pytest.mark.parametrize("empty", [None, []])
def test_no_value_falls_through_to_the_next_level(empty: Any) -> None:
    conditions = [{"filter": "mlp", "value": empty}, {"value": 1}]
    r = recipe("task_arithmetic", {"weight": empty}, {"weight": conditions}, {"weight": 0.7})
    assert value(r, mlp(0), "weight") == (0.7, 0.7)
    assert value(r, attention(0), "weight") == (0.7, 1.0)


def test_mergekit_defaults_rule_unless_style_says_authors() -> None:
    steps = recipe("ties", {"weight": 1}, {"weight": 1}).steps_for(HEAD, 0.0).combine
    assert vars(steps) | {"weight": 0} == {
        "style": "mergekit",
        "weight": 0,
        "density": (1.0, 1.0),
        "merge_func": None,
        "normalize": True,
        "rescale": False,
        "scope": "tensor",
        "scale": 1.0,
    }
    authors = recipe("ties", style="authors")
    assert value(authors, HEAD, "density") == (0.2, 0.2) and value(authors, HEAD, "scope") == "global"


def test_base_is_no_task_of_a_task_vector_method() -> None:
    models = [{"model": "a", "parameters": {"weight": 1}}, {"model": "base", "parameters": {"weight": 5}}]
    raw = {"base_model": "base", "merge_method": "task_arithmetic", "models": models}
    r = Recipe.from_dict(raw)
    assert [m.path for m in r.models] == ["a"] and r.subtract_base and value(r, HEAD, "weight") == (1.0,)
    assert r.notes == ("parameters of the base model base have no effect: weight",)


def test_linear_averages_a_listed_base_in_place_and_adds_an_unlisted_one_last() -> None:
    models = [{"model": "base", "parameters": {"weight": [1, 0]}}, {"model": "a", "parameters": {"weight": 0.3}}]
    r = Recipe.from_dict({"base_model": "base", "merge_method": "linear", "models": models})
    assert [m.path for m in r.models] == ["base", "a"] and not r.subtract_base
    assert [value(r, mlp(i), "weight") for i in (0, 3)] == [(1.0, 0.3), (0.0, 0.3)]
    added = Recipe.from_dict(
        {"base_model": "base", "merge_method": "linear", "models": models[1:], "parameters": {"weight": 0.5}}
    )
    assert [m.path for m in added.models] == ["a", "base"] and value(added, HEAD, "weight") == (0.3, 0.5)


def test_linear_with_an_unlisted_base_without_weight_is_an_error() -> None:
    models = [{"model": "a", "parameters": {"weight": 0.3}}]
    with pytest.raises(RecipeError, match="base_model: linear averages the base like any other model"):
        Recipe.from_dict({"base_model": "base", "merge_method": "linear", "models": models})


@pytest.mark.parametrize("listed", [["a", "base"], ["base", "a"], ["a"]])
def test_slerp_starts_at_the_base(listed: list[str]) -> None:
    t = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7]}, {"value": 0.5}]
    models = [{"model": name} for name in listed]
    raw = {"slices": None, "base_model": "base", "merge_method": "slerp", "models": models, "parameters": {"t": t}}
    r = Recipe.from_dict(raw)
    assert [m.path for m in r.models] == ["base", "a"] and not r.subtract_base
    assert [value(r, attention(i), "t") for i in range(4)] == [0.0, 0.5, 0.3, 0.7] and value(r, HEAD, "t") == 0.5


@pytest.mark.parametrize("listed", [["a", "b"], ["a", "base", "b"]])
@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_an_optional_base_is_the_origin_and_no_model(method: str, listed: list[str]) -> None:
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in listed]
    with_base = Recipe.from_dict({"base_model": "base", "merge_method": method, "models": models})
    assert [m.path for m in with_base.models] == ["a", "b"] and with_base.subtract_base
    assert value(with_base, HEAD, "weight") == (0.5, 0.5)
    without = Recipe.from_dict({"merge_method": method, "models": [m for m in models if m["model"] != "base"]})
    assert [m.path for m in without.models] == ["a", "b"] and not without.subtract_base


@pytest.mark.parametrize(("base", "wanted"), [(None, "2, got 3"), ("base", "2 beside the base, got 3")])
def test_nuslerp_takes_two_models(base: str | None, wanted: str) -> None:
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("a", "b", "c")]
    with pytest.raises(RecipeError, match=f"nuslerp merges {wanted}"):
        Recipe.from_dict({"base_model": base, "merge_method": "nuslerp", "models": models})


@pytest.mark.parametrize("base", [None, "base"])
def test_purify_needs_the_optional_base(base: str | None) -> None:
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("a", "b")]
    raw = {"base_model": base, "merge_method": "multislerp", "models": models, "purify": "trim"}
    if base:
        Recipe.from_dict(raw)
    else:
        with pytest.raises(RecipeError, match="purify: multislerp merges whole weights, .*; give base_model"):
            Recipe.from_dict(raw)


def test_karcher_averages_the_base_like_any_other_model() -> None:
    raw = {"base_model": "base", "merge_method": "karcher", "models": [{"model": "a"}, {"model": "b"}]}
    r = Recipe.from_dict(raw)
    assert [m.path for m in r.models] == ["a", "b", "base"] and not r.subtract_base
    assert r.notes == ("karcher averages the base like any other model: base is one of its models",)
    listed = Recipe.from_dict(raw | {"models": [{"model": "base"}, {"model": "a"}]})
    assert [m.path for m in listed.models] == ["base", "a"] and listed.notes == ()
    with pytest.raises(RecipeError, match="karcher averages the base like any other model: list it, or drop this key"):
        Recipe.from_kwargs("base", ["a", "b"], "karcher")


def test_a_model_listed_twice_is_an_error() -> None:
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("a", "./a")]
    with pytest.raises(RecipeError, match=r"models\[1\]: ./a is listed twice"):
        Recipe.from_dict({"base_model": "base", "merge_method": "ties", "models": models})


def test_parameters_without_effect_become_notes() -> None:
    r = recipe("task_arithmetic", {"weight": 1, "density": 0.5}, {"weight": 1}, {"int8_mask": True, "rescale": True})
    assert [note.split(" has ")[0] for note in r.notes] == ["density", "int8_mask", "rescale"]


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({}, None),
        ({"dtype": "bfloat16"}, "BF16"),
        ({"dtype": "float32", "out_dtype": "torch.float16"}, "F16"),
        ({"out_dtype": "float64"}, "F64"),
    ],
)
def test_output_dtype(keys: dict[str, str], code: str | None) -> None:
    assert recipe("ties", {"weight": 1}, {"weight": 1}, **keys).output_dtype == code


def test_defaults_of_the_methods_on_spheres_and_of_della() -> None:
    weights: Any = ({"weight": 1}, {"weight": 1})
    values = vars(recipe("nuslerp", *weights).steps_for(HEAD, 0.0).combine)
    assert values == {"weight": (1.0, 1.0), "nuslerp_flatten": True, "nuslerp_row_wise": False}
    values = vars(recipe("multislerp", *weights).steps_for(HEAD, 0.0).combine)
    assert values == {"weight": (1.0, 1.0), "normalize_weights": True, "eps": 1e-8}
    assert vars(recipe("karcher").steps_for(HEAD, 0.0).combine) == {"max_iter": 10, "tol": 1e-5}
    values = vars(recipe("model_stock").steps_for(HEAD, 0.0).combine)
    assert values == {"style": "mergekit", "filter_wise": False, "clamp": False}
    for method, normalize in (("della", True), ("della_linear", False)):
        values = vars(recipe(method, *weights).steps_for(HEAD, 0.0).combine)
        assert values == {
            "style": "mergekit",
            "weight": (1.0, 1.0),
            "density": (1.0, 1.0),
            "epsilon": (0.15, 0.15),
            "rescale": True,
            "normalize": normalize,
            "scale": 1.0,
        }
    for method in ("nuslerp", "multislerp", "della", "della_linear"):
        with pytest.raises(RecipeError, match="weight: must be given for a, b"):
            recipe(method)


def test_a_required_value_that_no_filter_gives_names_the_tensors() -> None:
    r = recipe("task_arithmetic", {"weight": [{"filter": "mlp", "value": 1}]}, {"weight": 1})
    with pytest.raises(RecipeError, match=r"embed_tokens.weight, .* and 4 more: a: weight: must be given"):
        r.resolve(NAMES)
    r.resolve([mlp(0), mlp(1)])
