"""The doors against mergekit itself: the same commands and calls, the same files."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch
import yaml

import pymerge
from pymerge.integrations.mergekit_options import NO_EFFECT, MergekitOptions, parse_size
from tests.integrations.mergekit_models import door, write_llamas
from tests.models import read_model

pytest.importorskip("mergekit", reason="mergekit is not installed here: make test-mergekit")

LINEAR = {
    "merge_method": "linear",
    "models": [{"model": "./a", "parameters": {"weight": 0.7}}, {"model": "./b", "parameters": {"weight": "3e-1"}}],
    "dtype": "float32",
}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_llamas(tmp_path, extra={"model.extra.weight": torch.ones(3)})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def theirs(script: str, *arguments: object) -> None:
    """mergekit's own command; without a card, for which it asks the Hub."""
    from click.testing import CliRunner

    main = importlib.import_module(f"mergekit.scripts.{script}").main
    given = [*map(str, arguments), "--quiet", "--no-write-model-card"]
    done = CliRunner().invoke(main, given, catch_exceptions=False)
    assert done.exit_code == 0, done.output


def write(name: str, *documents: dict) -> str:
    Path(name).write_text(yaml.safe_dump_all(documents))
    return name


def shards(folder: str) -> list[set[str]]:
    """Names of the tensors in each file."""
    from safetensors import safe_open

    found = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.append(set(file.keys()))
    return found


def assert_equal(ours: str, other: str) -> None:
    a, b = read_model(Path(ours)), read_model(Path(other))
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-7)


def test_every_option_has_a_place() -> None:
    from mergekit.options import MergeOptions

    have = {field.name: field.default for field in dataclasses.fields(MergekitOptions)}
    for name, field in MergeOptions.model_fields.items():
        assert have[name] == field.default, name
    assert set(NO_EFFECT) <= set(MergeOptions.model_fields)


def test_every_flag_is_accepted(models) -> None:
    from mergekit.scripts.run_yaml import main

    shown = door("yaml", "--help", folder=models).stdout
    for option in main.params:
        for flag in (*option.opts, *option.secondary_opts):
            assert not flag.startswith("-") or flag[:40] in shown, flag


def test_sizes() -> None:
    from mergekit.common import parse_kmb

    for text in ("20K", "1K", "8k", "3000", "0", "5B", "7b", "1m"):
        assert parse_size(text) == parse_kmb(text)


@pytest.mark.parametrize("text", ["3000", "8k", "0"])
def test_shards_of_a_size(models, text) -> None:
    config = write("m.yml", LINEAR)
    theirs("run_yaml", config, "theirs", "--out-shard-size", text)
    assert door("yaml", config, "ours", "--out-shard-size", text, folder=models).returncode == 0
    assert_equal("ours", "theirs")
    limit, sizes = parse_size(text), {name: tensor.nbytes for name, tensor in read_model(models / "a").items()}
    for folder in ("ours", "theirs"):
        for names in shards(folder):
            assert limit == 0 or len(names) == 1 or sum(sizes[name] for name in names) <= limit
    assert (len(shards("ours")) == 1) == (len(shards("theirs")) == 1)


def test_keys_and_tensors_that_mergekit_ignores(models) -> None:
    raw = LINEAR | {"models": [LINEAR["models"][0], {"model": "./extra", "parameters": {"weight": 0.3, "foo": 1}}]}
    config = write("odd.yml", raw | {"densty": 3, "parameters": {"normalise": False}})
    theirs("run_yaml", config, "theirs")
    done = door("yaml", config, "ours", folder=models)
    assert done.returncode == 0 and done.stderr.count("ignored, as by mergekit") == 3
    assert_equal("ours", "theirs")


def test_several_documents(models) -> None:
    first = LINEAR | {"name": "first"}
    second = LINEAR | {
        "name": "second",
        "models": [{"model": "first", "parameters": {"weight": 1}}, LINEAR["models"][1]],
    }
    last = {
        "merge_method": "ties",
        "base_model": "./base",
        "models": [{"model": name, "parameters": {"weight": 1}} for name in ("first", "second")],
        "parameters": {"density": 1},
        "dtype": "float32",
    }
    config = write("multi.yml", last, second, first)
    theirs("multimerge", config, "-I", "theirs", "--out-path", "theirs/out")
    done = door("multi", config, "-I", "ours", "--out-path", "ours/out", folder=models)
    assert done.returncode == 0, done.stderr
    for name in ("first", "second", "out"):
        assert_equal(f"ours/{name}", f"theirs/{name}")


def test_run_merge_takes_mergekits_own_objects(models) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    lambda_text = {"parameters": {"weight": 1, "lambda": "5e-1"}, "base_model": {"model": {"path": "./base"}}}
    options = MergeOptions(out_shard_size=3000, write_model_card=False, quiet=True)
    for raw in (LINEAR, LINEAR | {"merge_method": "task_arithmetic"} | lambda_text):
        run_merge(MergeConfiguration.model_validate(raw), "theirs", options)
        pymerge.run_merge(MergeConfiguration.model_validate(raw), "ours", options)
        assert_equal("ours", "theirs")
        assert len(shards("ours")) > 1 and not Path("ours/mergekit_config.yml").exists()
