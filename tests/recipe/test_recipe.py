from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from pymerge.errors import RecipeError
from pymerge.methods.base import TensorInfo
from pymerge.recipe import Recipe

RICH: dict[str, Any] = {
    "base_model": "base",
    "models": [
        {"model": "a", "parameters": {"weight": [0, 1], "density": 0.5}},
        {"model": "b", "parameters": {"weight": [{"filter": "mlp", "value": [1, "1e-1"]}, {"value": 0.5}]}},
    ],
    "merge_method": "dare_linear",
    "parameters": {"lambda": 2, "normalize": False, "density": 1},
    "purify": {"method": "trim", "per_model": {"density": [0.5, [0.1, 0.2]]}},
    "exclude": "*.bias",
    "style": "authors",
    "seed": 7,
    "strict": False,
    "relax": {"vocabulary": "base_rows"},
    "dtype": "bfloat16",
}


@pytest.mark.parametrize("keys", [{}, {"merge_method": "ties", "parameters": {"lambda": 1}, "purify": ["dare"]}])
def test_plain_data_and_yaml_give_the_same_recipe_back(keys: dict[str, Any]) -> None:
    recipe = Recipe.from_dict(RICH | keys)
    again = Recipe.from_dict(recipe.to_dict())
    assert again == recipe and again.to_dict() == recipe.to_dict() and again.digest() == recipe.digest()
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_to_dict_is_canonical() -> None:
    recipe = Recipe.from_dict(RICH)
    assert recipe.to_dict() == {
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": [0.0, 1.0], "density": 0.5}},
            {"model": "b", "parameters": {"weight": [{"filter": "mlp", "value": [1.0, 0.1]}, {"value": 0.5}]}},
        ],
        "merge_method": "dare_linear",
        "parameters": {"scale": 2.0, "normalize": False, "density": 1.0},
        "purify": [{"method": "trim", "per_model": {"density": [0.5, [0.1, 0.2]]}}],
        "exclude": ["*.bias"],
        "style": "authors",
        "seed": 7,
        "strict": False,
        "relax": {"vocabulary": "base_rows"},
        "dtype": "bfloat16",
    }


@pytest.mark.parametrize(
    "change", [{"seed": 8}, {"exclude": []}, {"dtype": None}, {"parameters": {"lambda": 3}}, {"style": None}]
)
def test_digest_changes_with_anything_that_changes_the_output(change: dict[str, Any]) -> None:
    assert Recipe.from_dict(RICH | change).digest() != Recipe.from_dict(RICH).digest()


def test_equal_hyperparameters_give_the_same_steps() -> None:
    recipe = Recipe.from_dict(RICH)
    names = [f"layers.{i}.{part}.weight" for i in range(3) for part in ("mlp", "attn")]
    steps = recipe.resolve(names)
    assert steps[names[1]] is recipe.steps_for("layers.0.other", 0.0)
    assert steps[names[0]] is not steps[names[1]] and steps[names[0]].purify[0] is steps[names[1]].purify[0]
    static = Recipe.from_kwargs("base", ["a", "b"], "ties")
    assert static.steps_for("x", 0.0) is static.steps_for("layers.3.y", 1.0)


def test_python_lists_are_per_model_and_inner_lists_are_gradients() -> None:
    recipe = Recipe.from_kwargs(
        "base", ["a", "b"], "ties", density=[0.5, [0.1, 0.3]], purify={"method": "dare", "density": [0.9, 0.8]}
    )
    steps = recipe.steps_for("layers.1.w", 0.5)
    assert vars(steps.combine)["density"] == (0.5, 0.2) and vars(steps.purify[0])["density"] == (0.9, 0.8)
    assert recipe.style == "authors" and vars(steps.combine)["scope"] == "global"


def test_python_models_in_memory() -> None:
    base, first, second = {"w": 0}, {"w": 1}, {"w": 1}
    recipe = Recipe.from_kwargs(base, [first, second], "task_arithmetic", scale=0.5)
    assert recipe.base is not None and recipe.base.value is base
    assert [m.value is given for m, given in zip(recipe.models, (first, second), strict=True)] == [True, True]
    assert [m.path for m in recipe.models] == ["<models[0] in memory>", "<models[1] in memory>"]
    with pytest.raises(RecipeError, match=r"models\[1\]: <models\[1\] in memory> is listed twice"):
        Recipe.from_kwargs(base, [first, first], "task_arithmetic")


def test_python_base_rules() -> None:
    assert [m.path for m in Recipe.from_kwargs(None, ["a", "b"], "slerp", t=0.5).models] == ["a", "b"]
    assert [m.path for m in Recipe.from_kwargs("base", ["b"], "slerp", t=0.5).models] == ["base", "b"]
    assert [m.path for m in Recipe.from_kwargs(None, ["a", "b"], "linear").models] == ["a", "b"]
    with pytest.raises(RecipeError, match="linear averages the base like any other model"):
        Recipe.from_kwargs("base", ["a", "b"], "linear")
    with pytest.raises(RecipeError, match="base_model: must be given: ties needs a base"):
        Recipe.from_kwargs(None, ["a", "b"], "ties")


def test_python_problems_come_together() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_kwargs("base", ["a", "b"], "ties", density=[0.1], sclae=2, scope="all")
    assert str(caught.value).splitlines() == [
        "merge: 3 problems",
        "  - density: has 1 entries for 2 models: give one value or one a model",
        "  - parameters: unknown hyperparameter 'sclae': did you mean scale or rescale or scope?",
        "  - parameters: scope: must be one of tensor, global, got 'all'",
    ]


def test_method_without_the_authors_style_keeps_its_own_in_python() -> None:
    recipe = Recipe.from_kwargs("base", ["a", "b"], "breadcrumbs_ties")
    assert recipe.style == "mergekit" and Recipe.from_dict(recipe.to_dict()) == recipe


def test_selection_by_pattern() -> None:
    models = {"base": "base", "models": ["a"], "method": "task_arithmetic"}
    everything = Recipe.from_kwargs(**models)
    some = Recipe.from_kwargs(**models, include=["*.layers.*"], exclude=["*.bias", "*.layers.0.*"])
    names = ["embed.weight", "m.layers.0.w", "m.layers.1.w", "m.layers.1.bias"]
    assert [everything.selects(n) for n in names] == [True] * 4
    assert [some.selects(n) for n in names] == [False, False, True, False]
    assert list(some.resolve(names)) == ["m.layers.1.w"]


def test_leniency_is_named() -> None:
    assert Recipe.from_kwargs("base", ["a"], "ties").relaxations == {}
    assert Recipe.from_kwargs("base", ["a"], "ties", relax={"missing": "skip"}).relaxations == {"missing": "skip"}
    assert Recipe.from_dict(RICH).relaxations == {
        "missing": "base",
        "extra": "drop",
        "vocabulary": "base_rows",
        "overflow": "clamp",
        "nonfinite": "keep",
        "buffers": "base",
    }


def test_planning_thousands_of_tensors_is_quick() -> None:
    import time

    recipe = Recipe.from_dict(RICH)
    names = [f"model.layers.{i}.{part}{j}.weight" for i in range(32) for part in ("mlp", "attn") for j in range(71)]
    start = time.process_time()
    assert len(recipe.resolve(names)) == 4544
    assert time.process_time() - start < 1.0


def test_recipes_need_no_torch() -> None:
    code = "import sys, pymerge.recipe; sys.exit('torch' in sys.modules or 'yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=sys.path[0] or None).returncode == 0


def test_seed_reaches_the_mask() -> None:
    keys = []
    for seed in (0, 1):
        steps = Recipe.from_kwargs("base", ["a"], "dare_linear", seed=seed).steps_for("w", 0.0)
        keys.append(vars(steps.combine)["density"])
        info = TensorInfo(name="w", shape=(4,), tasks=1, seed=seed)
        keys[-1] = steps.combine.rule(info).keys  # pyright: ignore[reportAttributeAccessIssue]
    assert keys[0] != keys[1]
