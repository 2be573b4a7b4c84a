"""pymerge-yaml and run_merge: mergekit's YAML, flags, options and manners, without mergekit."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import pymerge
from pymerge.errors import MissingTensor, NonFinite, OutputError, RecipeError, UnsafeFile
from pymerge.integrations.mergekit_options import NO_EFFECT, MergekitOptions, parse_size
from pymerge.recipe.keys import RELAXATIONS
from tests.hub_cache import cache_model
from tests.integrations.mergekit_models import CONFIG, door, llama_tensors, summary_of, write_llamas
from tests.models import read_model, same, write_model

TEXT = """\
# merged by hand
merge_method: dare_ties
base_model: base
models:
  - {model: a, parameters: {weight: 1e0}}
  - {model: b, parameters: {weight: 0.5}}
parameters: {density: 0.5, lambda: "1e0"}
dtype: float32
"""
IDLE = ["--allow-crimes", "--low-cpu-memory", "--read-to-gpu", "--clone-tensors", "--async-write"]
IDLE += ["--write-threads", "4", "--lora-merge-cache", "x", "--lora-merge-dtype", "float16", "-vv"]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    nan = llama_tensors(1)["model.norm.weight"].clone()
    nan[3] = float("nan")
    write_llamas(
        tmp_path,
        extra={"model.extra.weight": torch.ones(3)},
        ints={"model.position_ids": torch.ones(3, dtype=torch.int64)},
        nan={"model.norm.weight": nan},
    )
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "m.yml").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(**changes) -> dict:
    return yaml.safe_load(TEXT) | changes


def of_two(model: str) -> dict:
    return config(models=[{"model": name, "parameters": {"weight": 1}} for name in ("a", model)])


def test_the_command_merges_as_pymerge_does(models) -> None:
    done = door("yaml", "m.yml", "out", folder=models)
    assert done.returncode == 0 and not done.stderr and "21 tensors" in done.stdout
    pymerge.Recipe.from_yaml("m.yml").run("wanted")
    assert same(read_model(models / "out"), read_model(models / "wanted"))
    written = {"README.md", "config.json", "merge.json", "mergekit_config.yml", "model.safetensors", "tokenizer.json"}
    assert {p.name for p in (models / "out").iterdir()} == written
    assert (models / "out" / "mergekit_config.yml").read_text() == TEXT
    assert re.search(r"base_model:\n- \"base\"\n- \"a\"\n- \"b\"\n", (models / "out" / "README.md").read_text())
    assert pymerge.verify("out")["tensors"] == 21


def test_flags_without_effect_have_none_and_say_why(models) -> None:
    assert door("yaml", "m.yml", "out", *IDLE, "--quiet", "-j", 1, folder=models).stdout == ""
    pymerge.Recipe.from_yaml("m.yml").run("wanted")
    assert same(read_model(models / "out"), read_model(models / "wanted"))
    shown = door("yaml", "--help", folder=models).stdout
    panel = shown[shown.index("accepted, no effect, because") :]
    for name, why in NO_EFFECT.items():
        assert f"--{name.replace('_', '-')}" in panel or name == "verbosity"
        assert " ".join(why.split()[:4]) in panel


def test_files_that_flags_leave_out(models) -> None:
    done = door("yaml", "m.yml", "out", "--no-write-model-card", "--no-copy-tokenizer", folder=models)
    assert done.returncode == 0 and "the base's tokenizer was not copied, as asked" in done.stdout
    assert {p.name for p in (models / "out").iterdir()} == {"config.json", "merge.json", "model.safetensors"}


def test_unknown_keys_are_ignored_with_a_warning(models) -> None:
    raw = config(densty=3, tokenizr={"a": 1})
    raw["models"][0] |= {"wieght": 2, "parameters": {"weight": 1, "lambda": 2, "foo": 1}}
    raw["parameters"] |= {"densty": 3}
    (models / "odd.yml").write_text(yaml.safe_dump(raw))
    done = door("yaml", "odd.yml", "out", folder=models)
    warned = [line.removeprefix("warning: ") for line in done.stderr.splitlines()]
    assert done.returncode == 0 and len(warned) == 6
    for key in ("'densty': did you mean density?", "'tokenizr'", "'wieght'", "'foo'", "lambda has one value for the"):
        assert any(key in line for line in warned), key
    assert set(warned) <= set(summary_of(models / "out")["notes"]) and warned[0] not in done.stdout
    pymerge.Recipe.from_yaml("m.yml").run("wanted")
    assert same(read_model(models / "out"), read_model(models / "wanted"))
    with pytest.raises(RecipeError, match="6 problems"):
        pymerge.Recipe.from_yaml("odd.yml")


def test_what_mergekit_does_not_check(models) -> None:
    summary = pymerge.run_merge(of_two("extra"), "out")
    assert summary["relaxations"] == {"extra": "drop", "buffers": "base"}
    assert "only in extra, dropped: 1 tensor(s): model.extra.weight" in summary["notes"]
    assert "model.extra.weight" not in read_model(models / "out")
    write_model(models / "base", llama_tensors(0) | {"model.position_ids": torch.zeros(3, dtype=torch.int64)}, CONFIG)
    pymerge.run_merge(of_two("ints"), "out")
    assert torch.equal(read_model(models / "out")["model.position_ids"], torch.zeros(3, dtype=torch.int64))


def test_what_would_change_weights_unasked_is_refused(models) -> None:
    with pytest.raises(NonFinite, match="model.norm.weight"):
        pymerge.run_merge(of_two("nan"), "out")
    tensors = llama_tensors(1)
    del tensors["model.norm.weight"]
    write_model(models / "lacks", tensors, CONFIG)
    with pytest.raises(MissingTensor, match="model.norm.weight"):
        pymerge.run_merge(of_two("lacks"), "out")
    assert not (models / "out").exists()
    kept = pymerge.run_merge(of_two("lacks") | {"relax": {"missing": "base"}}, "out")
    assert kept["relaxations"] == {"extra": "drop", "buffers": "base", "missing": "base"}


@pytest.mark.skipif("truncate" not in RELAXATIONS["vocabulary"], reason="vocabularies are not cut yet")
def test_vocabularies_are_cut_where_the_flag_says_so(models) -> None:
    longer = {name: torch.ones(40, 16) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    write_model(models / "longer", llama_tensors(1) | longer, CONFIG | {"vocab_size": 40})
    (models / "longer.yml").write_text(yaml.safe_dump(of_two("longer")))
    refused = door("yaml", "longer.yml", "out", folder=models)
    assert refused.returncode == 3 and "VocabMismatch" in refused.stderr
    assert door("yaml", "longer.yml", "out", "--unsafe-truncate-embeddings", folder=models).returncode == 0
    assert read_model(models / "out")["lm_head.weight"].shape == (32, 16)
    assert summary_of(models / "out")["relaxations"]["vocabulary"] == "truncate"


def test_code_and_pickles_stay_out(models) -> None:
    (models / "base" / "config.json").write_text(json.dumps(CONFIG | {"auto_map": {"AutoConfig": "evil.C"}}))
    (models / "base" / "evil.py").write_text(f"open({str(models / 'marker')!r}, 'w')\n")
    done = door("yaml", "m.yml", "out", "--trust-remote-code", folder=models)
    assert done.returncode == 0 and not (models / "marker").exists()
    line = "--trust-remote-code has no effect: code that comes with a model is never run"
    assert f"warning: {line}" in done.stderr and line in summary_of(models / "out")["notes"]
    torch.save(llama_tensors(1), models / "a" / "pytorch_model.bin")
    (models / "a" / "model.safetensors").unlink()
    with pytest.raises(UnsafeFile), pytest.warns(UserWarning, match="only with --allow-pickle"):
        pymerge.run_merge("m.yml", "pickled", {"lazy_unpickle": True})
    pymerge.run_merge("m.yml", "pickled", {"allow_pickle": True})
    assert same(read_model(models / "pickled"), read_model(models / "out"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-safe-serialization"], "pymerge writes no pickled weights, only safetensors"),
        (["--out-shard-size", "5GB"], "'5GB' is no size as mergekit writes it: 5B (5e9 bytes), 500M, 800K"),
        (["--device", "mps:9"], "device 'mps:9' cannot be used here"),
    ],
    ids=["pickle", "size", "device"],
)
def test_refused_in_one_line(models, flags, message) -> None:
    done = door("yaml", "m.yml", "out", *flags, folder=models)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (models / "out").exists()


def test_sizes() -> None:
    sizes = {"5B": 5 * 10**9, "5b": 5 * 10**9, "20M": 2 * 10**7, "8k": 8000, "123": 123}
    assert {text: parse_size(text) for text in sizes} == sizes


def test_the_seed_of_the_flag(models) -> None:
    for name, options in {"one": {"random_seed": 7}, "again": {"random_seed": 7}, "zero": None}.items():
        pymerge.run_merge(TEXT, name, options)
    pymerge.run_merge(config(seed=7), "recipe")
    found = {name: read_model(models / name) for name in ("one", "again", "zero", "recipe")}
    assert same(found["one"], found["again"]) and same(found["one"], found["recipe"])
    assert not same(found["one"], found["zero"])


def test_a_folder_that_a_merge_wrote_is_replaced_and_no_other(models) -> None:
    (models / "empty").mkdir()
    pymerge.run_merge(TEXT, "empty")
    pymerge.run_merge(config(parameters={"density": 1}), "empty")
    assert summary_of(models / "empty")["recipe"]["parameters"] == {"density": 1.0}
    (models / "empty" / "merge.json").unlink()  # as mergekit leaves it
    pymerge.run_merge(TEXT, "empty")
    before = {p.name: p.read_bytes() for p in (models / "empty").iterdir()}
    (models / "empty" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"files that no merge wrote \(notes.txt\)"):
        pymerge.run_merge(config(parameters={"density": 1}), "empty")
    assert {p.name: p.read_bytes() for p in (models / "empty").iterdir()} == before | {"notes.txt": b"mine"}
    with pytest.raises(OutputError, match="holds a model that no merge wrote"):
        pymerge.run_merge(TEXT, "ints")
    pymerge.run_merge(TEXT, "ints", {"overwrite": True})
    assert same(read_model(models / "ints"), read_model(models / "empty"))


def test_models_of_the_cache(models) -> None:
    pytest.importorskip("huggingface_hub")
    commit = cache_model(models / "cache", "org/a", models / "a").name
    (models / "hub.yml").write_text(TEXT.replace("model: a", "model: org/a@main"))
    done = door("yaml", "hub.yml", "out", "--transformers-cache", "cache", folder=models)
    assert done.returncode == 0 and summary_of(models / "out")["resolved"]["org/a@main"]["commit"] == commit
    absent = door("yaml", "hub.yml", "other", folder=models)
    assert absent.returncode == 2 and "download it with --download, or: hf download org/a" in absent.stderr


def test_every_form_of_a_configuration(models) -> None:
    raw = config()
    as_text = SimpleNamespace(to_yaml=lambda: TEXT)
    dumped = SimpleNamespace(model_dump=lambda **how: raw if how == {"mode": "json", "exclude_none": True} else None)
    wanted = pymerge.Recipe.from_yaml("m.yml")
    wanted.run("wanted")
    for given in (raw, TEXT, "m.yml", Path("m.yml"), as_text, dumped, wanted):
        pymerge.run_merge(given, "out")
        assert same(read_model(models / "out"), read_model(models / "wanted"))
        assert yaml.safe_load((models / "out" / "mergekit_config.yml").read_text())["merge_method"] == "dare_ties"
    pymerge.run_merge(raw, "out", config_source="# as it was\n")
    assert (models / "out" / "mergekit_config.yml").read_text() == "# as it was\n"
    for wrong in ([1], 3, "a: [", {"models": {1}}):
        with pytest.raises(RecipeError):
            pymerge.run_merge(wrong, "never")


@dataclass
class Given:
    """As a program may pass it: some of mergekit's names."""

    cuda: bool = False
    num_threads: int = 1
    out_shard_size: int = 3000
    other: str = "not ours"


def test_every_form_of_options(models) -> None:
    assert MergekitOptions.of(None) == MergekitOptions()
    engine = pymerge.Options(threads=1, shard_bytes=3000)
    for given in (Given(), {"num_threads": 1, "out_shard_size": "3k"}, engine):
        pymerge.run_merge(TEXT, "out", given)
        assert len(list((models / "out").glob("*.safetensors"))) > 2
    assert MergekitOptions.of(Given()).for_merge(overwrite=True) == pymerge.Options(
        threads=1, shard_bytes=3000, overwrite=True
    )
    assert MergekitOptions(gpu_rich=True).for_merge(overwrite=False).device == "cuda"
    assert MergekitOptions(cuda=True, device="cuda:1").for_merge(overwrite=False).device == "cuda:1"
    for all_of_them in (MergekitOptions(device="auto"), MergekitOptions(cuda=True, multi_gpu=True)):
        assert all_of_them.for_merge(overwrite=False).device == "auto"
    assert MergekitOptions(quiet=True, restart=True).for_merge(overwrite=False).resume is False
    with pytest.raises(RecipeError, match="unknown option 'cudo': did you mean cuda?"):
        pymerge.run_merge(TEXT, "never", {"cudo": True})
    with pytest.raises(RecipeError, match="none of mergekit's option names"):
        pymerge.run_merge(TEXT, "never", object())


def test_what_is_ignored_is_warned_of(models) -> None:
    with pytest.warns(UserWarning, match="ignored, as by mergekit: unknown key 'densty'") as caught:
        pymerge.run_merge(config(densty=1), "out")
    assert caught[0].filename == os.path.abspath(__file__)
