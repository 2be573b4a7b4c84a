"""tokenizer_source, tokenizer and chat_template of a recipe."""

from typing import Any

import pytest

from pymerge.errors import RecipeError
from pymerge.recipe import Recipe
from pymerge.recipe.tokenizer import CHAT_TEMPLATES, TokenRule, Vocabulary


def raw(**keys: Any) -> dict[str, Any]:
    return {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "a"}]} | keys


def recipe(**keys: Any) -> Recipe:
    found = Recipe.from_dict(raw(parameters={"weight": 1.0}, **keys))
    again = Recipe.from_dict(found.to_dict())
    assert again == found and again.digest() == found.digest() and Recipe.from_yaml(found.to_yaml()) == found
    return found


def test_sources() -> None:
    assert recipe().vocabulary is None
    assert recipe(tokenizer_source="union").vocabulary == recipe(tokenizer={}).vocabulary == Vocabulary(source="union")
    found = recipe(tokenizer={"source": "b"}).vocabulary
    assert found is not None and not isinstance(found.source, str) and found.source.path == "b"
    assert recipe(tokenizer_source={"model": {"path": "b"}}).vocabulary == found
    assert recipe(tokenizer_source="base").to_dict()["tokenizer_source"] == "base"


def test_tokens() -> None:
    tokens = {
        "<a>": {"source": "a", "force": True},
        "<b>": {"source": {"kind": "zero"}},
        "<c>": {"source": {"kind": "model_token", "model": "base", "token": "x"}},
        "<d>": {"source": {"kind": "model_token", "model": "base", "token_id": 0}},
        "<e>": {},
    }
    found = recipe(tokenizer={"source": "base", "tokens": tokens, "pad_to_multiple_of": 64})
    assert found.vocabulary is not None and found.vocabulary.pad == 64
    rules = found.vocabulary.tokens
    assert [rule.kind for rule in rules.values()] == ["own", "zero", "model_token", "model_token", "own"]
    assert [rule.token for rule in rules.values()] == [None, None, "x", 0, None]
    assert rules["<a>"].force and rules["<e>"] == TokenRule()
    assert found.to_dict()["tokenizer"] == {"source": "base", "tokens": tokens, "pad_to_multiple_of": 64}


@pytest.mark.parametrize("text", ["auto", *CHAT_TEMPLATES, "{{ messages }}"])
def test_chat_templates(text: str) -> None:
    assert recipe(chat_template=text).chat_template == text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tokenizer_source": "base", "tokenizer": {}}, "give tokenizer_source or tokenizer, not both"),
        ({"tokenizer_source": "nowhere"}, "tokenizer_source: nowhere: no such file or folder"),
        ({"tokenizer": "union"}, "tokenizer: must be {source, tokens, pad_to_multiple_of}, got 'union'"),
        ({"tokenizer": {"sorce": "base"}}, "tokenizer: unknown key 'sorce': did you mean source"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "must be a whole number from 1 to 1048576, got 0"),
        ({"tokenizer": {"tokens": ["<a>"]}}, "tokens: must be {TOKEN: {source: ..., force: ...}}"),
        ({"tokenizer": {"tokens": {1: {"source": "a"}}}}, "tokens: 1: a token is text: put it into quotes"),
        ({"tokenizer": {"tokens": {"x": "a"}}}, "tokens: 'x': must be {source: ..., force: ...}, got 'a'"),
        ({"tokenizer": {"tokens": {"x": {"force": True}}}}, "'x': force needs a source"),
        ({"tokenizer": {"tokens": {"x": {"source": "a", "force": 1}}}}, "'x': force: must be true or false, got 1"),
        ({"tokenizer": {"tokens": {"x": {"source": {"kind": "nil"}}}}}, "'x': source: unknown kind 'nil'"),
        ({"tokenizer": {"tokens": {"x": {"source": {"kind": "zero", "model": "a"}}}}}, "source: unknown key 'model'"),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "a"}}}}},
            "'x': source: needs either token (text) or token_id",
        ),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "token": "y"}}}}},
            "'x': source: model: must be the path of a model, got None",
        ),
        ({"chat_template": "chatlm"}, "chat_template: unknown template 'chatlm': did you mean chatml"),
        ({"chat_template": 3}, "chat_template: must be text"),
        ({"relax": {"vocabulary": "cut"}}, "relax: vocabulary: must be base_rows or truncate, got 'cut'"),
    ],
)
def test_problems(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.from_dict(raw(**keys))
    assert message in str(error.value)
