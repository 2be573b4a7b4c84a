"""Tokenizer keys of a YAML in pymerge and in mergekit 0.1.5: tensors, config, tokens, encodings.

`make test-mergekit` runs them in an environment with mergekit. What mergekit draws anew in every run is not compared:
the order of new tokens in a union (rows are compared token by token) and, without a base, which model is the first."""

import pytest
import torch
import yaml

pytest.importorskip("mergekit", reason="mergekit is not installed: make test-mergekit")

import transformers
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from tokenizers import AddedToken
from transformers.utils.chat_template_utils import _compile_jinja_template

from pymerge.engine.api import Recipe
from pymerge.vocabulary.templates import BUILT_IN
from tests.models import read_model
from tests.vocabulary.small import TEXTS, byte_level, config_of, llama, unigram, vocabulary, word_piece

SAMPLES = [*(text for texts in TEXTS.values() for text in texts[:2]), "<tool> def <sp> x </s>", "für 日本 <new>"]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    chatty = byte_level("plain", 300)
    chatty.chat_template = "{{ messages[0].content }} of base"
    kinds = {
        "base": (chatty, {}),
        "a": (byte_level("code", 310, added=["<tool>", AddedToken("<sp>", special=True)]), {}),
        "b": (byte_level("other", 290, special=("<s>", "</s>", "<pad>"), added=["<tool>"]), {"rows": 320}),
    }
    for seed, (name, (tokenizer, options)) in enumerate(kinds.items()):
        llama(folder / name, tokenizer, seed, **options)
        llama(folder / f"tied_{name}", tokenizer, seed, tied=True, **options)
        llama(folder / f"half_{name}", tokenizer, seed, **options)
        transformers.LlamaForCausalLM.from_pretrained(folder / f"half_{name}", dtype=torch.bfloat16).save_pretrained(
            folder / f"half_{name}"
        )
    for seed, name in enumerate(("plain", "code")):
        torch.manual_seed(seed)
        tokenizer = word_piece(name, 60 + 20 * seed)
        config = {"dim": 8, "hidden_dim": 12, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 32}
        model = transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(vocab_size=len(tokenizer), **config))
        torch.nn.init.normal_(model.vocab_projector.bias)
        model.save_pretrained(folder / f"bert_{name}")
        tokenizer.save_pretrained(folder / f"bert_{name}")
        llama(folder / f"unigram_{name}", unigram(name, 40 + 10 * seed), seed)
    return folder


def described(names, keys, *, base=None, method="linear"):
    """A recipe in YAML's words, with paths below the current folder."""
    weights = [0.5, 0.3, 0.2]
    models = [{"model": name, "parameters": {"weight": w}} for name, w in zip(names, weights, strict=False)]
    recipe = {"merge_method": method, "models": models, "dtype": "float32"} | ({"base_model": base} if base else {})
    return recipe | keys


def merged_by_both(recipe, folder, tmp_path, monkeypatch, **options):
    """The folders that pymerge and mergekit write."""
    monkeypatch.chdir(folder)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    recipe = {key: value for key, value in recipe.items() if key != "relax"}
    theirs = MergeConfiguration.model_validate(recipe)
    run_merge(theirs, str(tmp_path / "theirs"), MergeOptions(write_model_card=False, quiet=True, **options))
    Recipe.from_yaml(tmp_path / "recipe.yaml").run(tmp_path / "ours")
    return tmp_path / "ours", tmp_path / "theirs"


def assert_equal(ours, theirs, *, same_ids=True, same_text=True):
    """Tensors, config and what the tokenizers do."""
    one, other = vocabulary(ours), vocabulary(theirs)
    assert one.keys() == other.keys()
    if same_ids:
        assert one == other
    places = torch.tensor([other[token] for token in sorted(one, key=lambda token: one[token])])
    got, expected = read_model(ours), read_model(theirs)
    assert got.keys() == expected.keys()
    for name in expected:
        wanted, own = expected[name], got[name]
        if wanted.shape[0] >= len(places):  # rows are tokens, then padding
            wanted = torch.cat([wanted[places], wanted[len(places) :]])
        torch.testing.assert_close(own, wanted, atol=1e-6, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert comparable(config_of(ours)) == comparable(config_of(theirs))
    if not same_text:
        return
    loaded = [transformers.AutoTokenizer.from_pretrained(path) for path in (ours, theirs)]
    for text in SAMPLES:
        assert loaded[0].tokenize(text) == loaded[1].tokenize(text)
        ids = [tokenizer(text)["input_ids"] for tokenizer in loaded]
        assert loaded[0].decode(ids[0]) == loaded[1].decode(ids[1])
        assert ids[0] == ids[1] or not same_ids
    assert loaded[0].special_tokens_map == loaded[1].special_tokens_map
    assert loaded[0].chat_template == loaded[1].chat_template
    special = [{t.content: str(t) for t in tokenizer.added_tokens_decoder.values()} for tokenizer in loaded]
    assert special[0] == special[1]


def comparable(config):
    return {k: v for k, v in config.items() if k not in ("torch_dtype", "dtype", "transformers_version")}


FORCED = {"source": "union", "tokens": {"<tool>": {"source": "b", "force": True}, "def": {"source": "a"}}}
KINDS = {
    "source": "union",
    "tokens": {
        "<pad>": {"source": {"kind": "zero"}},
        "<sp>": {"source": {"kind": "model_token", "model": "base", "token": "</s>"}, "force": True},
        "<tool>": {"source": {"kind": "model_token", "model": "a", "token_id": 17}},
        "<new>": {"source": {"kind": "model_token", "model": "b", "token": "<tool>"}},
    },
}
CASES = {
    "union with a base": (["a", "b"], {"tokenizer_source": "union"}, {"base": "base", "method": "task_arithmetic"}),
    "union without a base": (["base", "a", "b"], {"tokenizer_source": "union"}, {}),
    "base": (["base", "a", "b"], {"tokenizer_source": "base"}, {"base": "base"}),
    "base, without one": (["a"], {"tokenizer_source": "base"}, {}),
    "a model": (["a", "b"], {"tokenizer_source": "b"}, {"base": "base", "method": "ties"}),
    "not a merged model": (["base", "a"], {"tokenizer_source": "b"}, {}),
    "tokens, forced": (["base", "a", "b"], {"tokenizer": FORCED}, {"base": "base"}),
    "zero and model_token": (["base", "a", "b"], {"tokenizer": KINDS}, {"base": "base"}),
    "padded": (["base", "a"], {"tokenizer": {"source": "a", "pad_to_multiple_of": 64}}, {"base": "base"}),
    "padded union": (["base", "a", "b"], {"tokenizer": {"pad_to_multiple_of": 100}}, {}),
    "tied": (["tied_base", "tied_a", "tied_b"], {"tokenizer_source": "union"}, {"base": "tied_base"}),
    "bfloat16": (["half_base", "half_a", "half_b"], {"tokenizer": {"pad_to_multiple_of": 8}}, {}),
    "bert": (["bert_plain", "bert_code"], {"tokenizer_source": "union"}, {"base": "bert_plain"}),
    "unigram": (["unigram_plain", "unigram_code"], {"tokenizer_source": "union"}, {}),
    "a chat template": (["base", "a"], {"tokenizer_source": "base", "chat_template": "chatml"}, {"base": "base"}),
    "Jinja": (
        ["base", "a"],
        {"tokenizer_source": "base", "chat_template": "{{ messages[0]['content'] }}"},
        {"base": "base"},
    ),
    "auto": (["a", "base"], {"tokenizer_source": "a", "chat_template": "auto"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_mergekit(case, folder, tmp_path, monkeypatch):
    names, keys, how = CASES[case]
    ours, theirs = merged_by_both(described(names, keys, **how), folder, tmp_path, monkeypatch)
    if "chatml" in str(keys):
        template = _compile_jinja_template((ours / "chat_template.jinja").read_text())
        expected = _compile_jinja_template((theirs / "chat_template.jinja").read_text())
        assert template.render(messages=CHAT) == expected.render(messages=CHAT)
        (ours / "chat_template.jinja").write_text((theirs / "chat_template.jinja").read_text())
    union = keys.get("tokenizer_source", keys.get("tokenizer", {}).get("source", "union")) == "union"
    # Without a base mergekit adds the tokens to the tokenizer of a model that it draws anew in every run.
    assert_equal(ours, theirs, same_ids=not union, same_text=not union or "base" in how)


@pytest.mark.parametrize("asked", ["chatml", "auto", "{{ messages[0]['content'] }} {# mine #}"])
def test_a_chat_template_alone(asked, folder, tmp_path, monkeypatch):
    names = ["base", "half_base"]
    ours, theirs = merged_by_both(described(names, {"chat_template": asked}), folder, tmp_path, monkeypatch)
    loaded = [transformers.AutoTokenizer.from_pretrained(path) for path in (ours, theirs)]
    shown = [tokenizer.apply_chat_template(CHAT, tokenize=False) for tokenizer in loaded]
    assert shown[0] == shown[1]
    assert loaded[0].get_vocab() == loaded[1].get_vocab()


def test_truncated(folder, tmp_path, monkeypatch):
    recipe = described(["base", "b"], {"relax": {"vocabulary": "truncate"}})
    ours, theirs = merged_by_both(recipe, folder, tmp_path, monkeypatch, unsafe_truncate_embeddings=True)
    got, expected = read_model(ours), read_model(theirs)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-6, rtol=1e-6)
    rows = got["lm_head.weight"].shape[0]
    assert rows == 300 == config_of(ours)["vocab_size"]  # mergekit leaves the size of its first model, in any order


TURNS = {
    "one": [{"role": "user", "content": " hi "}],
    "answered": CHAT[:2],
    "system": [{"role": "system", "content": "be kind"}, *CHAT],
}


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates(name, prompt, turns):
    """Equal, but for white space that mergekit's files add to three formats: each is without it what we render."""
    from importlib.resources import files

    text = files("mergekit._data.chat_templates").joinpath(f"{name}.jinja").read_text()
    keys = {"messages": TURNS[turns], "add_generation_prompt": prompt, "bos_token": "<s>", "eos_token": "</s>"}
    got, expected = (_compile_jinja_template(t).render(**keys) for t in (BUILT_IN[name], text))
    if name == "llama3":  # a line feed behind every turn
        expected = expected.replace("<|eot_id|>\n", "<|eot_id|>")
    elif name == "alpaca":  # no blank line before the last heading
        expected = expected.removesuffix("### Response:\n").rstrip("\n") + (
            "\n\n### Response:\n" if expected.endswith("### Response:\n") else ""
        )
    elif name == "exaone":  # indentation and line feeds around every piece
        got, expected = ("".join(text.split()) for text in (got, expected))
    assert got == expected
