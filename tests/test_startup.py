"""What starting pymerge costs, counted in imports: torch and transformers only where they are needed."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

HEAVY = ("torch", "transformers", "scipy", "sklearn", "mergekit", "peft", "ray", "fsspec")
REPORT = f"""
import json, sys
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), file=sys.__stderr__)
"""


def imported_after(code: str) -> list[str]:
    """Which heavy packages a fresh interpreter has imported after `code`."""
    run = subprocess.run([sys.executable, "-c", code + REPORT], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stderr.splitlines()[-1])


def command(*arguments: object) -> str:
    return f"""
import sys
sys.argv = {["pymerge", *map(str, arguments)]!r}
from pymerge.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


def test_import_is_light():
    assert imported_after("import pymerge") == []


def test_public_names_are_light_until_used():
    assert imported_after("import pymerge; dir(pymerge); pymerge.methods.describe('ties'); pymerge.Recipe") == []


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["merge", "--help"], ["demo", "--help"], ["search", "--help"], ["inspect", "--help"], ["methods"]],
    ids=" ".join,
)
def test_commands_that_only_answer_are_light(arguments):
    assert imported_after(command(*arguments)) == []


@pytest.mark.parametrize("name", ["yaml", "multi"])
def test_the_doors_of_mergekit_are_light(name):
    code = command("--help").replace("pymerge.cli import main", f"pymerge.cli.mergekit import {name}_main as main")
    assert imported_after(code) == []


@pytest.fixture
def models(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.standard_normal((5, 7)).astype(np.float32)
    values = {"base": base}
    for name in ("a", "b"):
        values[name] = base + rng.standard_normal(base.shape).astype(np.float32)
    for name, value in values.items():
        (tmp_path / name).mkdir()
        save_file({"layer.weight": value}, tmp_path / name / "model.safetensors", {"format": "pt"})
    return tmp_path


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_ties", "breadcrumbs"])
def test_merge_from_disk_to_disk_needs_no_torch(models, method):
    recipe = models / "recipe.yaml"
    entries = "".join(f"  - {{model: {models / name}, parameters: {{weight: 0.5}}}}\n" for name in ("a", "b"))
    base = "" if method == "linear" else f"base_model: {models / 'base'}\n"
    recipe.write_text(f"merge_method: {method}\n{base}models:\n{entries}")
    assert imported_after(command("merge", recipe, models / "out", "--quiet")) == []
    assert os.listdir(models / "out").count("model.safetensors") == 1
