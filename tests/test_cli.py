"""The command line as a user meets it: what it prints, where, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import yaml

from tests.models import family, read_model, write_model


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe for a small family; returns its path."""
    base, models = family(tmp_path, 2)

    def write(**changes):
        entry = {
            "base_model": str(base),
            "models": [{"model": str(m), "parameters": {"weight": 0.5}} for m in models],
            "merge_method": "task_arithmetic",
        } | changes
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(entry))
        return path

    return write


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "pymerge", *map(str, arguments)], capture_output=True, text=True)


def test_merge_then_verify(recipe, tmp_path):
    done = run("merge", recipe(), tmp_path / "out")
    assert done.returncode == 0 and "4 tensors" in done.stdout and "peak memory" in done.stdout and not done.stderr
    assert set(read_model(tmp_path / "out")) == {
        "embed.weight",
        "layers.0.up.weight",
        "layers.0.up.bias",
        "layers.1.norm",
    }
    checked = run("verify", tmp_path / "out")
    assert checked.returncode == 0 and "all as written" in checked.stdout


def test_quiet_says_nothing(recipe, tmp_path):
    done = run("merge", recipe(), tmp_path / "out", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_all_problems_of_a_recipe_in_one_message(recipe, tmp_path):
    done = run("merge", recipe(merge_method="task_arithmetc", dtyp="bfloat16"), tmp_path / "out")
    assert done.returncode == 2 and "task_arithmetic" in done.stderr and "dtype" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(recipe, tmp_path):
    assert "Traceback" in run("merge", recipe(merge_method="x"), tmp_path / "out", "--debug").stderr


def test_exit_codes(recipe, tmp_path):
    path = recipe()
    (tmp_path / "full").mkdir()
    write_model(tmp_path / "full", read_model(tmp_path / "base"))
    assert run("merge", path, tmp_path / "full").returncode == 5  # a model is there already
    assert run("merge", path, tmp_path / "full", "--overwrite").returncode == 0
    (tmp_path / "tuned0" / "model.safetensors").write_bytes(b"short")
    broken = run("merge", path, tmp_path / "out")
    assert broken.returncode == 3 and "CorruptFile" in broken.stderr and "tuned0" in broken.stderr


def test_plan_computes_nothing_and_knows_the_bytes(recipe, tmp_path):
    done = run("plan", recipe(), "--json")
    facts = json.loads(done.stdout)
    size = sum(t.nbytes for t in read_model(tmp_path / "base").values())
    assert facts["bytes_read"] == 3 * size and facts["bytes_written"] == size and facts["tensors"]["merged"] == 4
    table = run("plan", recipe())
    assert table.returncode == 0 and "no problems found" in table.stdout and "embed.weight" in table.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"base", "tuned0", "tuned1", "recipe.yaml"}


def test_plan_refuses_what_merge_would_refuse(recipe, tmp_path):
    path = recipe()
    tensors = read_model(tmp_path / "tuned1")
    del tensors["layers.1.norm"]
    write_model(tmp_path / "tuned1", tensors)
    done = run("plan", path)
    assert done.returncode == 3 and "MissingTensor" in done.stderr and "layers.1.norm" in done.stderr


@pytest.mark.parametrize("text", ["lots", "1XB", "GB", "-1GB", "1.2.3MB"])
def test_sizes_that_are_none(recipe, tmp_path, text):
    done = run("merge", recipe(), tmp_path / "out", f"--memory={text}")
    assert done.returncode == 2 and "1GB" in done.stderr + done.stdout


def test_sizes():
    from pymerge.cli.options import parse_bytes

    texts = ("100", "1KB", "2mb", "1.5GB", "1GiB", "1e9", "512 MiB")
    assert [parse_bytes(t) for t in texts] == [100, 1000, 2_000_000, 1_500_000_000, 1 << 30, 10**9, 512 << 20]


def test_methods_are_listed_and_described():
    listed = run("methods")
    assert listed.returncode == 0 and all(
        m in listed.stdout for m in ("linear", "ties", "dare", "breadcrumbs", "slerp")
    )
    described = json.loads(run("methods", "ties", "--json").stdout)[0]
    density = next(p for p in described["parameters"] if p["name"] == "density")
    assert density["default"] == 0.2 and density["mergekit_default"] == 1.0
    assert run("methods", "tise").returncode == 2


def test_info_and_version():
    assert "processor path" in run("info", "--fast").stdout
    assert "delta_merge" in run("info").stdout
    assert run("--version").stdout.startswith("pymerge ")


def test_verify_needs_a_merge(tmp_path):
    write_model(tmp_path / "m", {})
    done = run("verify", tmp_path / "m")
    assert done.returncode == 3 and "merge.json" in done.stderr


def test_verify_says_what_it_compared(recipe, tmp_path):
    assert run("merge", recipe(), tmp_path / "out").returncode == 0
    checked = run("verify", tmp_path / "out", "--against", recipe())
    assert checked.stdout.rstrip().endswith(f"all as written, of {tmp_path / 'recipe.yaml'}"), checked.stdout


def test_models_that_are_not_there_are_not_the_same_model(recipe, tmp_path):
    models = [{"model": f"./absent{i}", "parameters": {"weight": 0.5}} for i in range(2)]
    found = run("plan", recipe(models=models))
    assert found.returncode == 2 and "./absent1: no such file" in found.stderr and "listed twice" not in found.stderr


def test_methods_are_shown_with_their_brackets(monkeypatch, capsys):
    from pymerge.engine.describe import show_methods
    from pymerge.methods import describe

    monkeypatch.setenv("COLUMNS", "300")
    show_methods([describe("esm")])
    assert "U = [E_1 w_1 | ..], V = [w_1 E_1^T D_1; ..]." in capsys.readouterr().out


def test_tables_in_files_are_not_cut_and_show_the_defaults_of_a_yaml():
    lines = run("methods", "ties").stdout.splitlines()
    row = next(line.split() for line in lines if line.startswith("style"))
    assert row[:5] == ["style", "authors", "mergekit", "one", "of"]
    assert row[-4:] == ["whose", "formula", "and", "defaults"]


@pytest.mark.parametrize("arguments", [("plan", "recipe.yaml"), ("methods", "--json")])
def test_a_full_disk_behind_standard_output_is_one_line(recipe, tmp_path, arguments):
    recipe()
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "pymerge", *arguments]
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 5 and done.stderr.count("\n") == 1 and "No space left" in done.stderr, done.stderr


def test_a_plan_of_shapes_promises_neither_memory_nor_a_merge():
    asked = ("plan", "--shape", "llama3-8b", "--method", "linear")
    shown = run(*asked).stdout
    assert "tensors" in shown and "at most" not in shown and "no problems found" not in shown
    assert json.loads(run(*asked, "--json").stdout)["memory_limit"] is None


@pytest.mark.parametrize("command", ["sweep", "search", "extract-lora"])
def test_commands_that_take_names_on_the_hub_can_download(command):
    from typer.main import get_command

    from pymerge.cli import app

    group: Any = get_command(app)
    options = group.commands[command].params
    assert "--download" in [name for option in options for name in option.opts]


def test_a_url_of_nothing(recipe):
    done = run("plan", recipe(base_model="s3://"))
    assert done.returncode == 2 and "s3://: names no bucket or path" in done.stderr, done.stderr


def test_a_budget_that_the_libraries_use_up_leaves_nothing(recipe):
    done = run("plan", recipe(), "--memory", "10MB")
    assert done.returncode == 2 and "leaves 0 MB" in done.stderr, done.stderr


def test_pytorch_counts_where_it_is_needed(recipe):
    assert run("plan", recipe(), "--memory", "160MB").returncode == 0
    done = run("plan", recipe(calibrate=[{"method": "svc"}]), "--memory", "160MB")
    assert done.returncode == 2 and "leaves 0 MB" in done.stderr, done.stderr
