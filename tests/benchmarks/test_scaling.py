"""Scaling: exponents are found again, counted costs grow as the formulas say, and a small run measures and reports."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    """The benchmark's modules, which import each other by their bare names."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return {name: importlib.import_module(name) for name in ("scaling_points", "scaling_report")}
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_a_fit_finds_a_known_exponent(modules):
    x = [0.1, 0.3, 1.0, 3.0]
    exact = modules["scaling_report"].fit(x, [5 * v**1.5 for v in x])
    assert exact.exponent == pytest.approx(1.5) and exact.error == pytest.approx(0, abs=1e-9)


def test_the_standard_error_is_that_of_the_slope(modules):
    """log x = 0, 1, 2 and log y = 0, 1 + d, 2: slope 1, residuals (-d, 2 d, -d) / 3, so s^2 = 2 d^2 / 3 over 2."""
    e, d = math.e, 0.3
    found = modules["scaling_report"].fit([1, e, e**2], [1, e ** (1 + d), e**2])
    assert found.exponent == pytest.approx(1) and found.error == pytest.approx(d / 3**0.5)
    assert modules["scaling_report"].fit([1, 2], [1, 4]).error is None
    assert modules["scaling_report"].fit([1], [1]) is None


@pytest.mark.parametrize(
    ("method", "variable", "values", "exponent"),
    [
        ("tsv_m", "hidden", (256, 1024), 3),
        ("esm", "hidden", (256, 1024), 3),
        ("pave + ties", "tasks", (2, 16), 1),
        ("linear", "layers", (100, 400), 1),
        ("assign", "hidden", (64, 128), 3),
        ("svc", "layers", (4, 16), 1),
    ],
)
def test_counted_costs_grow_as_the_formulas_say(modules, method, variable, values, exponent):
    point = modules["scaling_points"].Point
    shape = {"hidden": 256, "layers": 8}
    costs = [modules["scaling_points"].cost(point(method, **(shape | {variable: value}))) for value in values]
    found = modules["scaling_report"].fit(values, costs)
    assert found.exponent == pytest.approx(exponent, abs=0.02)


def measured_points(points: Any, report: ModuleType, seconds: Any, rss: Any) -> dict[str, Any]:
    cost = {"wall": 1.0, "others": 0.0, "load": 0.0, "runs": 1, "commit": "c", "time": "t"}
    found = {p.key: cost | {"cpu": 2.0 + seconds(p), "rss": rss(p)} for p in points}
    return found | {report.start_up(p).key: cost | {"cpu": 2.0, "rss": rss(p)} for p in points}


def test_growth_in_time_and_memory_is_told(modules, tmp_path):
    """Of made-up figures: the start-up is taken off, a quadratic growth and a growing peak are seen."""
    points, report = modules["scaling_points"], modules["scaling_report"]
    sizes = [points.Point("ties", 1024, layers) for layers in (4, 12, 40)]
    series = [points.Series("ties", "size", tuple(sizes))]
    base = {"processor": "p", "date": "d", "memory": "1GB"}
    good = base | {"points": measured_points(sizes, report, lambda p: 10 * p.at("size"), lambda p: 3e8)}
    report.write_report(good, series, tmp_path / "good.json")
    assert good["fits"][0]["exponent"] == pytest.approx(1, abs=1e-9) and not good["growing"]
    assert "as predicted" in (tmp_path / "good.md").read_text()
    bad = base | {"points": measured_points(sizes, report, lambda p: 100 * p.at("size") ** 2, lambda p: 1e7 * p.layers)}
    report.write_report(bad, series, tmp_path / "bad.json")
    assert bad["fits"][0]["exponent"] == pytest.approx(2, abs=1e-9) and bad["growing"] == ["ties"]
    assert "**differs**" in (tmp_path / "bad.md").read_text()
    assert {path.name for path in tmp_path.glob("*.png")} == {"good_size.png", "bad_size.png"}


def test_a_small_run_measures_and_continues(tmp_path):
    """A second run finds all points and measures nothing."""
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), "--quick", "--methods", "linear"]
    command += ["--reps", "1", "--core", "0", "--work", str(tmp_path / "work"), "--json", str(tmp_path / "found.json")]
    first = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["points"]) == first.stdout.count(" GB, others ") >= 4
    for cost in found["points"].values():
        assert cost["cpu"] > 0.1 and cost["wall"] > 0.1 and 2e7 < cost["rss"] < 5e8
    assert not list((tmp_path / "work").iterdir())
    subprocess.run(command, check=True, capture_output=True)
    assert json.loads((tmp_path / "found.json").read_text())["points"] == found["points"]
