"""docs/own_method is a package that works as its README says: built, installed, used in processes of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.models import family, read_model

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "docs/own_method"
COMMAND = [sys.executable, "-c", "from pymerge.cli import main; main()"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the built package; nothing is downloaded."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(SOURCE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    target = ["--target", str(folder / "installed"), str(folder / "source")]
    subprocess.run([sys.executable, "-m", "pip", "install", *offline, *target], check=True)
    return folder / "installed"


def run(command: Sequence[str | Path], installed: Path, folder: Path) -> str:
    path = os.pathsep.join([str(installed), str(ROOT)])
    found = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


def equal_loudness(base: torch.Tensor, tuned: Sequence[torch.Tensor], weights: Sequence[float], scale: float):
    deltas = [(t - base).double() for t in tuned]
    norms = [delta.norm() for delta in deltas]
    mean = sum(norms) / len(norms)
    parts = [w * delta * (mean / norm) for w, delta, norm in zip(weights, deltas, norms, strict=True)]
    return (base.double() + scale * sum(parts) / len(parts)).float()


def test_the_command_line_knows_it(installed: Path, tmp_path: Path) -> None:
    found = {row["name"]: row for row in json.loads(run([*COMMAND, "methods", "--json"], installed, tmp_path))}
    assert {found[name]["package"] for name in ("equal_loudness", "low_rank_mean")} == {"pymerge-own-method 0.1"}
    text = run([*COMMAND, "methods", "equal_loudness"], installed, tmp_path)
    assert "from the package pymerge-own-method 0.1" in text and "w_t, multiplies the task vector" in text


def test_a_recipe_and_python_use_it(installed: Path, tmp_path: Path) -> None:
    base, tuned = family(tmp_path, count=2)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", (SOURCE / "README.md").read_text(), re.DOTALL)
    for name, path in (("base", base), ("math", tuned[0]), ("code", tuned[1])):
        recipe = recipe.replace(f"./{name}", str(path))
    (tmp_path / "recipe.yaml").write_text(recipe)
    run([*COMMAND, "merge", "recipe.yaml", "out"], installed, tmp_path)
    summary = json.loads((tmp_path / "out/merge.json").read_text())
    assert summary["methods_from"] == {"equal_loudness": "pymerge-own-method 0.1"}
    code = f"""
import pymerge
pymerge.merge({str(base)!r}, {[str(t) for t in tuned]!r}, method="equal_loudness", weight=[2, 1], scale=0.8, out="same")
"""
    run([sys.executable, "-c", code], installed, tmp_path)
    models = [read_model(folder) for folder in (base, *tuned)]
    for name, tensor in read_model(tmp_path / "out").items():
        expected = equal_loudness(models[0][name], [m[name] for m in models[1:]], (2, 1), 0.8)
        torch.testing.assert_close(tensor, expected)
        assert torch.equal(tensor, read_model(tmp_path / "same")[name])


def test_its_own_tests_pass(installed: Path, tmp_path: Path) -> None:
    shutil.copytree(SOURCE / "tests", tmp_path / "tests")
    run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"], installed, tmp_path)
