from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pymerge.errors import RecipeError
from pymerge.recipe import Recipe


def path_of(model: Any, **options: Any) -> str:
    return (
        Recipe.from_dict(
            {"models": [{"model": model, "parameters": {"weight": 1}}], "merge_method": "linear"}, **options
        )
        .models[0]
        .path
    )


@pytest.mark.parametrize("name", ["a", "./a", "odd@name+x", "with space", "a.safetensors"])
def test_what_exists_is_a_path_whatever_its_characters(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir(exist_ok=True)
    assert path_of(name) == name and path_of(str(tmp_path / name)) == str(tmp_path / name)


def test_mapping_form() -> None:
    assert path_of({"model": {"path": "a"}}) == "a"
    assert path_of({"model": "a", "lora": None}) == "a"
    assert path_of({"path": "a", "revision": None}) == "a"
    assert path_of({"model": {"path": "a"}, "lora": {"path": "b"}}) == path_of("a+b") == "a+b"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("a+d", "a+d: the adapter d is no folder here"),
        ("a@main+b@main", "a@main+b@main: the adapter b@main is no folder here"),
        ("a@main", "revisions (@main) are not supported yet"),
        ("org/model", "names on the Hugging Face hub are not supported yet"),
        ("org/model@main", "names on the Hugging Face hub are not supported yet"),
        ({"model": {"path": "a", "revision": "main"}}, "revision is not supported yet"),
        ({"model": "a", "lora": "d"}, "a+d: the adapter d is no folder here"),
        ({"model": "a", "lora": {"path": "d", "revision": "main"}}, "lora: revision is not supported yet"),
        ({"model": "a", "override_architecture": "X"}, "override_architecture is not supported yet"),
        ({"modle": "a"}, "unknown key 'modle': did you mean model?"),
        ({"model": {"pth": "a"}}, "unknown key 'pth': did you mean path?"),
        ("", "must be the path of a model"),
        (None, "must be the path of a model"),
        (["a"], "must be the path of a model"),
        ("a\0b", "must be the path of a model"),
    ],
)
def test_refused(model: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"models[0]: {message}") + "|" + re.escape(message)):
        path_of(model)


def test_a_recipe_can_be_read_without_its_models() -> None:
    assert path_of("gone/model", models_must_exist=False) == "gone/model"
