"""S38, S46, S47: recipes that cannot be meant, from the command line: every problem in one message, exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.models import family

ROOT = Path(__file__).parents[2]


@pytest.fixture
def refused(tmp_path):
    """Runs a recipe that must be refused; what is said, without a traceback."""
    base, children = family(tmp_path, 2)

    def run(weights=(1.0, 1.0), **keys) -> str:
        models = [
            {"model": str(path), "parameters": {"weight": w} if w else {}}
            for path, w in zip(children, weights, strict=True)
        ]
        raw = {"merge_method": "ties", "base_model": str(base), "models": models} | keys
        recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
        recipe.write_text(yaml.safe_dump(raw))
        command = [sys.executable, "-m", "pymerge", "merge", str(recipe), str(out)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr and not list(tmp_path.glob("out*"))
        return done.stderr

    return run


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "dare_linear", "breadcrumbs"])
def test_S38_weights_that_sum_to_zero_cannot_be_normalised(refused, method):
    base = {"base_model": None} if method == "linear" else {}
    keys = base | {"merge_method": method, "parameters": {"normalize": True}}
    assert "the weights sum to 0" in refused((1.0, -1.0), **keys)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_S38_weights_must_be_finite(refused, weight):
    assert "weight: must be a finite number" in refused((1.0, weight))


def test_S46_everything_misspelt_is_said_at_once(refused):
    text = refused(nomralize=True, merge_metod="ties", parameters={"densty": 0.5}, relax={"misssing": "base"})
    for word, near in (("nomralize", "normalize"), ("merge_metod", "merge_method"), ("densty", "density")):
        assert word in text and f"did you mean {near}" in text
    assert "misssing" in text and "did you mean missing" in text


@pytest.mark.parametrize("method", ["dare-ties", "Ties", "task_arithmatic"])
def test_S46_an_unknown_method_names_the_nearest(refused, method):
    assert "did you mean" in refused(merge_method=method)


@pytest.mark.parametrize(
    ("method", "parameters", "range_said"),
    [
        ("ties", {"density": 2}, "in [0, 1]"),
        ("ties", {"density": -1}, "in [0, 1]"),
        ("ties", {"density": float("nan")}, "in [0, 1]"),
        ("ties", {"density": [0.5, 2]}, "in [0, 1]"),
        ("breadcrumbs", {"gamma": 1.5}, "in [0, 1]"),
        ("star", {"eta": 101}, "in [0, 100]"),
        ("wudi", {"steps": 0}, ">= 1"),
        ("esm", {"rank": 0}, ">= 1"),
        ("regmean", {"alpha": 2}, "in [0, 1]"),
    ],
)
def test_S47_out_of_range(refused, method, parameters, range_said):
    weights = (1.0, 1.0) if method in ("ties", "breadcrumbs") else (None, None)
    (name, value), *_ = parameters.items()
    worst = value[1] if isinstance(value, list) else value
    assert f"{name}: must be {range_said}, got {worst!r}" in refused(
        weights, merge_method=method, parameters=parameters
    )
