from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from pymerge.errors import RecipeError
from pymerge.recipe import Recipe
from pymerge.recipe.yaml_text import MAX_CHARACTERS, parse_yaml

TEXT = """
base_model: base
models:
  - model: a
    parameters: {weight: 1e0}
merge_method: task_arithmetic
"""


def test_text_path_and_string_path_give_the_same_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    expected = Recipe.from_yaml(TEXT)
    assert Recipe.from_yaml(path) == expected and Recipe.from_yaml("recipe.yaml") == expected
    assert expected.params == {} and expected.models[0].params["weight"].at("", 0.0) == 1.0


def test_the_file_is_named_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT.replace("weight", "wieght"))
    with pytest.raises(RecipeError, match=re.escape(str(path))):
        Recipe.from_yaml(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: 'a' is given twice"),
        ("models: [{model: a, model: b}]\n", "line 1: 'model' is given twice"),
        ("a: &x\n  b: *x\n", "an alias contains itself"),
        ("? [1, 2]\n: 3\n", "a key must be plain text"),
        ("a: [1, 2\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "holds 2 YAML documents, a recipe is one (pymerge-multi runs several)"),
        ("a: !!python/object/apply:os.system ['touch marker']\n", "not valid YAML"),
        ("a: 2024-99-99\n", "not a recipe"),
        ("\n", "the recipe is empty"),
        ("a: " + "[" * 40 + "]" * 40 + "\n", "nested more than 32 levels"),
        ("a: " + "[" * 5000 + "\n", "not a recipe: RecursionError"),
        ("a: '" + "x" * MAX_CHARACTERS + "'\n", "a recipe has at most"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_refused_text(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        parse_yaml(text, "recipe")
    assert not (tmp_path / "marker").exists()


def test_alias_bomb_is_refused_before_it_grows() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    start = time.process_time()
    with pytest.raises(RecipeError, match="expands to more than 100000 values"):
        parse_yaml("\n".join(lines), "recipe")
    assert time.process_time() - start < 1


def test_harmless_aliases_are_read() -> None:
    text = "base_model: base\nmodels:\n- {model: a, parameters: &p {weight: 0.5}}\n- {model: b, parameters: *p}\n"
    recipe = Recipe.from_yaml(text + "merge_method: task_arithmetic\n")
    assert [m.params["weight"].at("", 0.0) for m in recipe.models] == [0.5, 0.5]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_unreadable_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match="not UTF-8 text|cannot be read"):
        Recipe.from_yaml(path)
