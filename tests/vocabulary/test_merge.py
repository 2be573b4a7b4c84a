"""Merges of models with different vocabularies: equal to merging models whose rows were put in order by hand."""

import json
from pathlib import Path

import pytest
import torch

import pymerge
from pymerge.engine.local import merge_to_disk, plan_merge
from pymerge.engine.plan import Options
from pymerge.errors import InputError, OutputError, RecipeError, VocabMismatch
from pymerge.recipe import Recipe
from tests.adapters import random_factors, write_adapter
from tests.models import interrupted_after, read_model, same, write_model

transformers = pytest.importorskip("transformers")

from tests.vocabulary.small import WIDTH, byte_level, config_of, llama, unigram, vocabulary  # noqa: E402

NAMES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = byte_level("plain", 300)
    base.chat_template = "{{ 'of base' }}\n"
    a, b = byte_level("code", 310, added=["<tool>"]), byte_level("other", 290, special=("</s>", "<s>", "<pad>"))
    a.chat_template = b.chat_template = "{{ 'of two' }}"
    for seed, (name, tokenizer, rows) in enumerate((("base", base, None), ("a", a, None), ("b", b, 320))):
        llama(folder / name, tokenizer, seed, rows=rows)
    llama(folder / "tied", a, 1, tied=True)
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def recipe(*names, base="base", method="task_arithmetic", weight=0.5, **keys):
    models = [{"model": name, "parameters": {"weight": weight} if weight is not None else {}} for name in names]
    return Recipe.from_dict({"base_model": base, "models": models, "merge_method": method, "dtype": "float32"} | keys)


def in_order(name, tokens, names, base):
    """The tensors of a model with its rows in the order of `tokens`; of a token that it lacks that of the base, else
    the mean of those that have it."""
    known = {other: vocabulary(Path(other)) for other in names}
    tensors = {other: read_model(Path(other)) for other in known}
    out = dict(tensors[name])
    for weight in NAMES:
        rows = []
        for token in tokens:
            having = [other for other in known if token in known[other]]
            used = [name] if name in having else [base] if base in having else having
            rows.append(torch.stack([tensors[o][weight][known[o][token]] for o in used]).mean(0))
        out[weight] = torch.stack(rows)
    return out


METHODS = {
    "task_arithmetic": {},
    "ties": {"density": 0.5},
    "della": {"density": 0.7},
    "nuslerp": {},
    "karcher": {},
    "model_stock": {},
    "iso_c": {},
    "pcb": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_sees_models_of_one_vocabulary(method, tmp_path):
    base = None if method in ("nuslerp", "karcher") else "base"
    given = {"parameters": METHODS[method], "base": base}
    weight = None if method in ("karcher", "model_stock", "iso_c", "pcb") else 0.5
    names = ("a", "b") if base else ("base", "a")
    spectral = {"spectral": {"include": list(NAMES)}} if method == "iso_c" else {}
    summary = merge_to_disk(
        recipe(*names, method=method, weight=weight, tokenizer_source="union", **given, **spectral), tmp_path / "out"
    )
    tokens = sorted(found := vocabulary(tmp_path / "out"), key=lambda token: found[token])
    merged = [*([base] if base else []), *names]
    by_hand = {name: write_model(tmp_path / name, in_order(name, tokens, merged, base)) for name in merged}
    plain = recipe(*(str(by_hand[n]) for n in names), method=method, weight=weight, **given, **spectral).to_dict()
    plain |= {"base_model": str(by_hand["base"])} if base else {}
    merge_to_disk(Recipe.from_dict(plain), tmp_path / "expected")
    got, expected = read_model(tmp_path / "out"), read_model(tmp_path / "expected")
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-7)
    assert summary["vocabulary"]["tokens"] == summary["vocabulary"]["rows"] == len(tokens) == len(got[NAMES[0]])
    assert config_of(tmp_path / "out")["vocab_size"] == len(tokens)


def test_the_merged_model_runs_on_all_tokens(tmp_path):
    merge_to_disk(recipe("a", "b", tokenizer={"pad_to_multiple_of": 64}), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("def <tool> Hund the <pad>", return_tensors="pt")["input_ids"]
    assert model.config.vocab_size == 384 and int(ids.max()) > 300
    assert torch.isfinite(model(ids).logits).all()
    assert tokenizer.decode(ids[0]).replace(" ", "") == "def<tool>Hundthe<pad>"


def test_plan_and_summary_name_sizes_and_sources(tmp_path, capsys):
    asked = recipe("a", "b", tokenizer={"tokens": {"<new>": {"source": {"kind": "zero"}}}, "pad_to_multiple_of": 100})
    plan = plan_merge(asked)
    summary = merge_to_disk(asked, tmp_path / "out")
    base, a, b = (vocabulary(Path(name)) for name in ("base", "a", "b"))
    union = base.keys() | a.keys() | b.keys()
    told = summary["vocabulary"]
    assert told == plan.vocabulary and (told["source"], told["rows"]) == ("union", 400)
    assert told["tokens"] == len(union) + 1
    both = len((a.keys() & b.keys()) - base.keys())
    alone = {"a": len(a.keys() - base.keys() - b.keys()), "b": len(b.keys() - base.keys() - a.keys())}
    assert told["models"]["base"] == {"own": len(base), "from": alone, "mean": both, "zero": 1}
    of_a = {"base": len(base.keys() - a.keys()), "b": alone["b"]}
    assert told["models"]["a"] == {"own": len(a), "from": of_a, "mean": 0, "zero": 1}
    note = f"vocabulary (union): {len(union) + 1} tokens, 400 rows: those behind the tokens are the mean of the others"
    assert note in summary["notes"] and note in plan.notes
    assert f"rows of a: {len(a)} of its own, {of_a['base']} from base, {alone['b']} from b, 1 zero" in plan.notes


def test_order_of_a_union(tmp_path):
    """The base's ids stay; then plain tokens by model and id, then those that models have as added ones."""
    merge_to_disk(recipe("a", "b", tokenizer_source="union"), tmp_path / "out")
    ids = {name: sorted(vocab, key=lambda token: vocab[token]) for name in "ab" for vocab in [vocabulary(Path(name))]}
    expected = sorted(base := vocabulary(Path("base")), key=lambda token: base[token])
    for name in "ab":
        expected += [token for token in ids[name] if token not in expected and token not in ("<tool>", "<pad>")]
    found = vocabulary(tmp_path / "out")
    assert sorted(found, key=lambda token: found[token]) == [*expected, "<tool>", "<pad>"]


def test_tied_and_untied(tmp_path):
    """Rows of the head that others lack are those of the tied embedding."""
    merge_to_disk(recipe("b", "tied", base=None, method="linear", tokenizer_source="union"), tmp_path / "out")
    found, known, other = (vocabulary(path) for path in (tmp_path / "out", Path("tied"), Path("b")))
    token = next(token for token in known if token not in other)
    got, tied = read_model(tmp_path / "out"), read_model(Path("tied"))
    row = tied[NAMES[0]][known[token]]
    torch.testing.assert_close(got["lm_head.weight"][found[token]], row)


def test_special_tokens_keep_their_meaning(tmp_path):
    """b has other ids for the same tokens."""
    merge_to_disk(recipe("b", tokenizer_source="b"), tmp_path / "out")
    ids = vocabulary(tmp_path / "out")
    for file in ("config.json", "generation_config.json"):
        table = json.loads((tmp_path / "out" / file).read_text())
        assert (table["bos_token_id"], table["eos_token_id"]) == (ids["<s>"], ids["</s>"]) == (1, 0)
    other = byte_level("other", 290, special=("<pad>", "<start>", "<stop>"))
    other.bos_token, other.eos_token = "<start>", "<stop>"  # <s> and </s> are gone
    llama(tmp_path / "c", other, 3)
    summary = merge_to_disk(recipe(str(tmp_path / "c"), tokenizer_source=str(tmp_path / "c")), tmp_path / "own")
    said = 'config.json: token ids as in the new vocabulary: {"bos_token_id": 1, "eos_token_id": 2}'
    assert said in summary["notes"] and config_of(tmp_path / "own")["eos_token_id"] == 2
    merge_to_disk(recipe("b", tokenizer_source="union"), tmp_path / "union")
    before = (Path("base") / "generation_config.json").read_bytes()
    assert (tmp_path / "union" / "generation_config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("asked", "shown"),
    [("auto", "of two"), ("{{ 'mine' }}", "mine"), ("chatml", "<|im_start|>user\nhi<|im_end|>\n")],
)
@pytest.mark.parametrize("keys", [{}, {"tokenizer_source": "base"}], ids=["alone", "tokenizer"])
def test_chat_templates(asked, shown, keys, tmp_path):
    names = ("a",) if keys else ("half",)
    if not keys:  # models of one vocabulary
        for name, template in (("half", "{{ 'of two' }}"), ("third", " {{ 'of two' }}\n")):
            tokenizer = byte_level("plain", 300)
            tokenizer.chat_template = template
            if not Path(name).exists():
                llama(Path(name), tokenizer, 5)
        names = ("half", "third")
    merge_to_disk(
        recipe(*names, "b", chat_template=asked, **keys) if keys else recipe(*names, chat_template=asked),
        tmp_path / "out",
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == shown
    assert tokenizer.get_vocab() == vocabulary(Path("base"))


def test_no_template_anywhere(tmp_path):
    for name in ("x", "y"):
        llama(tmp_path / name, byte_level("plain", 300), 0)
    asked = recipe(str(tmp_path / "y"), base=str(tmp_path / "x"), chat_template="auto")
    summary = merge_to_disk(asked, tmp_path / "out")
    assert "chat template: auto: no model has one" in summary["notes"]
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_adapters_share_what_they_leave(tmp_path):
    """The embedding of adapters is their base's, padded once: it is copied, not merged."""
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (12, WIDTH) for i in range(2)}
    adapters = [write_adapter(tmp_path / f"adapter{i}", random_factors(i, shapes, 2), "base") for i in range(2)]
    given = {"method": "knots", "weight": None, "tokenizer": {"source": "base", "pad_to_multiple_of": 64}}
    summary = merge_to_disk(recipe(*map(str, adapters), **given), tmp_path / "out")
    assert summary["tensors"]["merged"] == 2
    got, base = read_model(tmp_path / "out"), read_model(Path("base"))
    for name in NAMES:
        assert torch.equal(got[name][:300], base[name])
        torch.testing.assert_close(got[name][300:], base[name].mean(0).expand(20, WIDTH))


def test_truncated(tmp_path):
    summary = merge_to_disk(recipe("a", "b", relax={"vocabulary": "truncate"}), tmp_path / "out")
    base, a, b = (read_model(Path(name)) for name in ("base", "a", "b"))
    rows = min(len(model[NAMES[0]]) for model in (base, a, b))
    for name in NAMES:
        first = base[name][:rows]
        expected = first + sum(0.5 * (m[name][:rows] - first) for m in (a, b))
        torch.testing.assert_close(read_model(tmp_path / "out")[name], expected)
    assert config_of(tmp_path / "out")["vocab_size"] == rows == summary["vocabulary"]["truncated"]["rows"]
    with pytest.raises(VocabMismatch, match=r"relax: \{vocabulary: base_rows\}"):
        merge_to_disk(recipe("b"), tmp_path / "refused")


def test_truncated_in_memory():
    states = [{"lm_head.weight": torch.randn(rows, 3)} for rows in (5, 7)]
    got = pymerge.merge(None, states, method="linear", weight=0.5, relax={"vocabulary": "truncate"})
    torch.testing.assert_close(
        got["lm_head.weight"], (states[0]["lm_head.weight"] + states[1]["lm_head.weight"][:5]) / 2
    )


def test_a_changed_tokenizer_does_not_resume(tmp_path, folder):
    changing = llama(tmp_path / "changing", byte_level("code", 310), 3)
    asked = recipe(str(changing), "a", tokenizer_source="union")
    with interrupted_after(3):
        merge_to_disk(asked, tmp_path / "out")
    merge_to_disk(asked, tmp_path / "other")
    table = json.loads((changing / "tokenizer_config.json").read_text())
    (changing / "tokenizer_config.json").write_text(json.dumps(table | {"model_max_length": 7}))
    with pytest.raises(OutputError):
        merge_to_disk(asked, tmp_path / "out")
    (changing / "tokenizer_config.json").write_text(json.dumps(table, indent=2) + "\n")
    merge_to_disk(asked, tmp_path / "out")
    assert same(read_model(tmp_path / "out"), read_model(tmp_path / "other"))


def test_tiles_that_cut_rows_change_nothing(tmp_path, monkeypatch):
    merge_to_disk(recipe("a", "b", tokenizer={"pad_to_multiple_of": 7}), tmp_path / "whole")
    monkeypatch.setattr("pymerge.engine.plan.TILE", 101)
    monkeypatch.setattr("pymerge.engine.plan.BATCH", 1)
    merge_to_disk(recipe("a", "b", tokenizer={"pad_to_multiple_of": 7}), tmp_path / "tiles", Options(threads=2))
    assert same(read_model(tmp_path / "whole"), read_model(tmp_path / "tiles"))


def test_other_kinds_of_tokenizers(tmp_path):
    for seed, text in enumerate(("plain", "code")):
        llama(tmp_path / text, unigram(text, 40 + seed), seed)
    asked = recipe(
        str(tmp_path / "plain"), str(tmp_path / "code"), base=None, method="linear", tokenizer_source="union"
    )
    merge_to_disk(asked, tmp_path / "out")
    found = vocabulary(tmp_path / "out")
    assert found.keys() == vocabulary(tmp_path / "plain").keys() | vocabulary(tmp_path / "code").keys()


def test_rows_of_other_widths_are_refused(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    byte_level("code", 300).save_pretrained(tmp_path / "wide")
    with pytest.raises(InputError, match=r"rows of one cannot stand in for rows of the other"):
        plan_merge(recipe("a", str(tmp_path / "wide"), tokenizer_source="union"))


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"tokens": {"<tool>": {"source": "b"}}}, "<tool> is unknown to its source b"),
        ({"tokens": {"<tool>": {"source": "tied"}}}, "tied is not one of the merged models: base, a, b"),
        ({"tokens": {"<x>": {}}}, "<x>: has no source, and base, a, b lack it"),
        ({"source": "a/config.json"}, "a/config.json: must be a model's folder, union or base"),
    ],
)
def test_rules_that_do_not_fit(tokenizer, message):
    with pytest.raises((InputError, RecipeError), match=message):
        plan_merge(recipe("a", "b", tokenizer=tokenizer))


@pytest.mark.parametrize("keys", [{"tokenizer_source": "base"}, {"relax": {"vocabulary": "truncate"}}], ids=str)
def test_what_needs_one_vocabulary_says_so(keys):
    with pytest.raises(RecipeError, match="align finds units of models of one vocabulary"):
        plan_merge(recipe("a", align={"method": "mudsc"}, **keys))
    behind = [{"model": name, "data": "a/config.json"} for name in ("a", "b")]
    with pytest.raises(RecipeError, match="regmean_plusplus runs each model behind merged layers"):
        plan_merge(
            Recipe.from_dict({"merge_method": "regmean_plusplus", "base_model": "base", "models": behind} | keys)
        )


def test_not_as_an_adapter(tmp_path):
    with pytest.raises(RecipeError, match="an adapter has no tokenizer of its own"):
        pymerge.merge(
            "base", ["a"], method="task_arithmetic", tokenizer_source="base", out=tmp_path / "o", as_adapter=2
        )


def test_truncation_leaves_models_of_one_size_alone(tmp_path):
    folders = [
        write_model(tmp_path / name, {"patch.weight": torch.full((3, 2), v)}) for name, v in (("x", 1.0), ("y", 3.0))
    ]
    asked = recipe(*map(str, folders), base=None, method="linear", relax={"vocabulary": "truncate"})
    summary = merge_to_disk(asked, tmp_path / "out")
    assert torch.equal(read_model(tmp_path / "out")["patch.weight"], torch.full((3, 2), 2.0))
    assert "vocabulary" not in summary


def test_truncation_of_modules_is_refused():
    modules = [torch.nn.Embedding(rows, 3) for rows in (5, 7)]
    with pytest.raises(RecipeError, match="other rows than the modules: give state dicts"):
        pymerge.merge(None, modules, method="linear", weight=0.5, relax={"vocabulary": "truncate"})
