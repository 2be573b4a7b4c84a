"""Tokenizers that come from strangers: nothing of theirs is run, what is damaged or missing is one error."""

import json
import os
import sys

import pytest
import torch

from pymerge.errors import CorruptFile, InputError, VocabMismatch
from pymerge.recipe import Recipe

transformers = pytest.importorskip("transformers")

from pymerge.engine.local import plan_merge  # noqa: E402
from tests.vocabulary.small import bare, byte_level  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level("plain", 280)


def model(folder, tokenizer, seed=0, **changed):
    rows = len(tokenizer)
    shapes = {"model.embed_tokens.weight": (rows, 4), "lm_head.weight": (rows, 4), "model.norm.weight": (4,)} | changed
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items() if shape}
    return bare(folder, tokenizer, tensors, {"model_type": "llama", "vocab_size": rows})


@pytest.fixture
def models(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [model(tmp_path / name, tokenizer, seed) for seed, name in enumerate("ab")]


def planned(**keys):
    models = [{"model": name} for name in "ab"]
    recipe = {"merge_method": "linear", "parameters": {"weight": 0.5}, "models": models, "tokenizer_source": "union"}
    return plan_merge(Recipe.from_dict(recipe | keys))


def refused(kind, **keys):
    with pytest.raises(kind) as error:
        planned(**keys)
    return str(error.value)


def test_what_is_refused_below_is_fine(models):
    assert planned().vocabulary["tokens"] == 280


def test_no_tokenizer(models):
    for path in models[1].glob("tokenizer*"):
        path.unlink()
    assert "b: no tokenizer can be loaded from" in refused(InputError)


def test_no_transformers(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert 'need transformers; install with: pip install "pymerge[hf]"' in refused(InputError)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": "1.0"}', "[" * 100_000, "\ufffd", "version https://git-lfs"]
)
def test_damaged(models, text):
    (models[1] / "tokenizer.json").write_text(text)
    message = "git-lfs pointer" if "git-lfs" in text else "b: no tokenizer can be loaded from this folder"
    assert message in refused(InputError)


def test_merges_of_tokens_that_are_not_there(models):
    table = json.loads((models[1] / "tokenizer.json").read_text())
    table["model"]["merges"].append(["nowhere", "never"])
    (models[1] / "tokenizer.json").write_text(json.dumps(table))
    assert "b: no tokenizer can be loaded from" in refused(InputError)


@pytest.mark.parametrize(("name", "size"), [("tokenizer.json", 1 << 40), ("tokenizer_config.json", 20_000_000)])
def test_too_large(models, name, size):
    os.truncate(models[1] / name, size)  # sparse: it must not be read
    assert f"{name}: {size} bytes, more than the" in refused(CorruptFile)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)])
def test_no_file(models, make):
    (models[1] / "tokenizer.json").unlink()
    make(models[1] / "tokenizer.json")
    assert "tokenizer.json" in refused(InputError)


def test_code_is_not_run(models, tmp_path):
    (models[1] / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((models[1] / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (models[1] / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        planned()
    except InputError:
        pass
    assert not (tmp_path / "ran").exists()


def test_slow(models):
    for path in models[1].glob("tokenizer*"):
        path.unlink()
    (models[1] / "vocab.json").write_text(json.dumps({"<unk>": 0, "a</w>": 1}))
    (models[1] / "merges.txt").write_text("#version\n")
    (models[1] / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CTRLTokenizer"}))
    assert "b: its tokenizer is a slow one (CTRLTokenizer)" in refused(InputError)


def test_ids_with_holes(models):
    table = json.loads((models[0] / "tokenizer.json").read_text())
    del table["model"]["vocab"]["!"]
    (models[0] / "tokenizer.json").write_text(json.dumps(table))
    assert "279 tokens with ids up to 279" in refused(InputError, tokenizer_source="base")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model.embed_tokens.weight": (288, 4)}, "b: model.embed_tokens.weight [288, 4] may be of its 280 tokens"),
        ({"model.extra_head.weight": (280, 4)}, "b: model.extra_head.weight [280, 4] may be of its 280 tokens"),
        ({"final_logits_bias": (1, 280)}, "b: final_logits_bias [1, 280] may be of its 280 tokens"),
        ({"model.embed_tokens.weight": None, "lm_head.weight": None}, "b: which tensors hold its 280 tokens cannot be"),
        ({"model.embed_tokens.weight": (9, 4), "lm_head.weight": (9, 4)}, "says {'vocab_size': 280}"),
    ],
)
def test_vocabularies_in_doubt(tmp_path, tokenizer, models, changed, message):
    model(tmp_path / "b", tokenizer, **changed)
    keys = {"tokenizer": {"pad_to_multiple_of": 64}}
    assert message in refused(VocabMismatch, tokenizer_source=None, **keys)


def test_no_doubt_where_all_rows_stay(tmp_path, tokenizer, models):
    for seed, name in enumerate("ab"):
        model(tmp_path / name, tokenizer, seed, **{"model.extra_head.weight": (280, 4)})
    assert planned().vocabulary["models"]["b"] == {"own": 280, "from": {}, "mean": 0, "zero": 0}


def test_models_in_memory():
    import pymerge

    state = {"lm_head.weight": torch.zeros(4, 2)}
    with pytest.raises(InputError, match="no folder with a tokenizer"):
        pymerge.merge(None, [state, dict(state)], method="linear", tokenizer_source="base")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_what_is_rewritten_is_read_before_the_merge(models, name):
    (models[0] / name).write_text("{")
    with pytest.raises(CorruptFile, match=name):
        planned(**({"tokenizer_source": None, "chat_template": "chatml"} if name.startswith("tok") else {}))
