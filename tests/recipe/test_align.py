"""`align` in a recipe: a file of permutations, or how they are found."""

from __future__ import annotations

import pytest

from pymerge.errors import RecipeError
from pymerge.recipe import Recipe


def recipe(align, **keys) -> Recipe:
    models = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 1}}]
    return Recipe.from_dict(
        {"models": models, "merge_method": "linear", "align": align} | keys, models_must_exist=False
    )


def problems(align, **keys) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe(align, **keys)
    return str(caught.value)


def test_a_file_of_permutations_stays_a_file():
    found = recipe("perms.safetensors")
    assert found.align is not None and found.align.file == "perms.safetensors"
    assert found.to_dict()["align"] == "perms.safetensors"
    assert recipe(None).align is None and "align" not in recipe(None).to_dict()


def test_a_search_keeps_what_is_given_and_converts_it():
    given = {"method": "mudsc", "data": "d.jsonl", "alpha": "0.25", "mode": "permute", "seed": 3, "samples": 8}
    align = recipe(given).align
    assert align is not None and align.data == "d.jsonl"
    assert align.search == {"alpha": 0.25, "mode": "permute", "seed": 3}
    assert align.sampling == {"samples": 8, "length": 128, "batch_size": 8, "field": "text"}


def test_plain_data_reads_back_to_an_equal_recipe():
    given = {"method": "mudsc", "data": "d.jsonl", "alpha": 0.25, "tie_heads": False, "spec": "vit"}
    first = recipe(given)
    again = Recipe.from_dict(first.to_dict(), models_must_exist=False)
    assert again == first and again.digest() == first.digest()
    assert recipe(given | {"alpha": 0.75}).digest() != first.digest()


@pytest.mark.parametrize(
    ("align", "said"),
    [
        ({"method": "mudcs"}, "method: must be mudsc, got 'mudcs'"),
        ({"alpha": 1.0}, "method: must be mudsc"),
        ({"method": "mudsc", "alhpa": 1}, "unknown key 'alhpa': did you mean alpha?"),
        ({"method": "mudsc", "data": "d", "alpha": 2}, r"alpha: must be in [0, 1], got 2"),
        ({"method": "mudsc", "data": "d", "mode": "zap"}, "mode: must be one of permute, zip"),
        ({"method": "mudsc", "alpha": 0.5}, "alpha: must be 1 where there is no `data`, got 0.5"),
        ({"method": "mudsc", "samples": 9}, "`data` gives none"),
        (3, "must be a file of permutations"),
    ],
)
def test_what_is_wrong_is_said(align, said):
    assert said in problems(align)


def test_files_must_be_there(tmp_path):
    data = {"models": [{"model": str(tmp_path)}], "merge_method": "linear"}
    for align in ("absent.safetensors", {"method": "mudsc", "data": "absent.safetensors"}):
        with pytest.raises(RecipeError, match=r"align.*absent.safetensors: no such file"):
            Recipe.from_dict(data | {"align": align})


def test_python_gives_objects_that_stay_objects():
    perms, batches = object(), [1, 2]
    given = Recipe.from_kwargs(None, [{}, {}], "linear", align=perms).align
    assert given is not None and given.value is perms and given.file == "<align in memory>"
    found = Recipe.from_kwargs(None, [{}, {}], "linear", align={"method": "mudsc", "data": batches}).align
    assert found is not None and found.batches is batches and found.file is None
