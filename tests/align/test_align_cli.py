"""`pymerge align`, and `align:` in a YAML recipe, as a user meets them: files in, files out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import pymerge
from pymerge.cli import app
from tests.models import read_model, same, write_model

transformers = pytest.importorskip("transformers")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two models with a tokenizer, a and b, and x.jsonl."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    config = transformers.BertConfig(
        vocab_size=14, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        transformers.BertForMaskedLM(config).save_pretrained(folder / name)
        transformers.BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder / name)
    lines = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(9)]
    (folder / "x.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def recipe(folder: Path, path: Path, align) -> Path:
    models = [{"model": str(folder / name), "parameters": {"weight": 1.0}} for name in ("a", "b")]
    path.write_text(yaml.safe_dump({"merge_method": "linear", "models": models, "align": align}))
    return path


def test_align_then_merge_is_what_a_recipe_does_in_one(folder, tmp_path):
    perms = tmp_path / "perms.safetensors"
    given = ["--data", folder / "x.jsonl", "--samples", 8, "--length", 6, "--alpha", 0.25, "--seed", 1]
    done = run("align", folder / "a", folder / "b", *given, "-o", perms)
    assert done.exit_code == 0, done.stderr
    units = pymerge.open_permutations(perms)
    for name, row in units.report["groups"].items():
        line = next(line for line in done.stdout.splitlines() if line.startswith(name + " "))
        assert f" {row['units']} " in line and f"{row['before'][0]:.3f}" in line and f"{row['after'][0]:.3f}" in line
    assert "alpha 0.25" in done.stdout and f"align: {perms}" in done.stdout

    search = {"method": "mudsc", "data": str(folder / "x.jsonl"), "samples": 8, "length": 6, "alpha": 0.25, "seed": 1}
    for name, align in (("given", str(perms)), ("found", search)):
        merged = run("merge", recipe(folder, tmp_path / f"{name}.yaml", align), tmp_path / name)
        assert merged.exit_code == 0, merged.stderr
        said = json.loads((tmp_path / name / "merge.json").read_text())["align"]
        assert said["groups"] == units.report["groups"] and said["models"] == [str(folder / "a"), str(folder / "b")]
    assert same(read_model(tmp_path / "given"), read_model(tmp_path / "found"))
    assert run("verify", tmp_path / "found", "--load").exit_code == 0
    a, b, merged = (read_model(path) for path in (folder / "a", folder / "b", tmp_path / "given"))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (a[name] + units.aligned(name, b[name], 1)) / 2, rtol=0, atol=1e-7)


def test_a_zip_is_found_saved_and_merged(folder, tmp_path):
    perms = tmp_path / "perms.safetensors"
    done = run("align", folder / "a", folder / "b", "--data", folder / "x.jsonl", "--mode", "zip", "-o", perms)
    assert done.exit_code == 0, done.stderr
    path = recipe(folder, tmp_path / "zip.yaml", str(perms))
    assert run("merge", path, tmp_path / "out").exit_code == 0
    path.write_text(path.read_text().replace("linear", "multislerp"))
    refused = run("merge", path, tmp_path / "other")
    assert refused.exit_code == 2 and "a zip is the mean of all models" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_weights_alone_need_no_samples(folder, tmp_path):
    done = run("align", folder / "a", folder / "b", "-o", tmp_path / "perms.safetensors", "-q")
    assert (done.exit_code, done.stdout) == (0, "")
    assert pymerge.open_permutations(tmp_path / "perms.safetensors").report["alpha"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--alpha", "0.5"], 2, "alpha: must be 1 where there is no `data`"),
        (["--data", "absent.jsonl"], 2, "absent.jsonl: no such file or folder"),
        (["--samples", "3"], 2, "`data` gives none"),
        (["--spec", "brt"], 3, "did you mean 'bert'"),
        (["-o", "perms.st"], 2, "must end in .safetensors"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_run(folder, tmp_path, arguments, code, said):
    done = run("align", folder / "a", folder / "b", "-o", tmp_path / "perms.safetensors", *arguments)
    assert done.exit_code == code and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "perms.safetensors").exists()


def test_a_folder_that_transformers_does_not_know_is_an_error(folder, tmp_path):
    for name in ("a", "b"):
        write_model(tmp_path / name, read_model(folder / name), {"num_attention_heads": 2})
    given = ["align", tmp_path / "a", tmp_path / "b", "--spec", "bert", "-o", tmp_path / "perms.safetensors"]
    assert run(*given, "-q").exit_code == 0
    shutil.copy(folder / "vocab.txt", tmp_path / "a")
    transformers.BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(tmp_path / "a")
    done = run(*given, "--data", folder / "x.jsonl")
    assert done.exit_code == 3 and "transformers cannot load it" in done.stderr and "Traceback" not in done.stderr
