"""Page, pictures and terminal of `pymerge inspect`: what they show, how large they are, hostile names."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pymerge
from pymerge.cli import app
from pymerge.engine.moments import OCTAVES, Moments
from pymerge.report.figures import Chart
from pymerge.report.inspect_page import TENSORS_SHOWN, sections, short_names, subtitle
from pymerge.report.inspection import Inspection, TensorFound
from pymerge.report.page import html_of
from pymerge.report.spectra import Overlap, Spectrum
from tests.models import family

LAYERS = {f"model.layers.{i}.{k}.weight": (12, 8) for i in range(3) for k in ("q", "up")} | {"model.norm": (8,)}


def run(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


@pytest.fixture
def models(tmp_path):
    return family(tmp_path, 2, shapes=LAYERS)


def test_command_writes_page_numbers_and_pictures(models, tmp_path):
    base, folders = models
    page, numbers, svg = tmp_path / "out" / "report.html", tmp_path / "out" / "found.json", tmp_path / "svg"
    done = run(base, *folders, "-o", page, "--json", numbers, "--svg", svg, "--rank", 4)
    assert done.exit_code == 0, done.output
    assert "tuned0" in done.output and "sign conflict" in done.output
    assert "What this suggests" in page.read_text() and "Over depth: model.layers" in page.read_text()
    found = json.loads(numbers.read_text())
    assert found["rank"] == 4 and len(found["layers"]) == 3 and len(found["kinds"]) == 3
    charts = [
        chart for section in sections(pymerge.inspect(str(base), list(map(str, folders)))) for chart in section.charts
    ]
    assert len(list(svg.iterdir())) == len(charts)


def test_sections_say_what_was_found(models):
    base, folders = models
    found = pymerge.inspect(str(base), list(map(str, folders)), rank=4)
    parts = {section.heading: section for section in sections(found)}
    sizes = parts["Over depth: model.layers"].charts[0]
    assert list(sizes.series) == ["tuned0", "tuned1"] and sizes.x == [0.0, 1.0, 2.0]
    layer = found.layers["model.layers", 1].moments
    assert sizes.series["tuned1"][1] == (layer.gram[1, 1] / layer.base) ** 0.5
    angles = parts["Between models"].charts[0]
    assert angles.kind == "heatmap" and angles.series["tuned0"][0] is None
    assert angles.series["tuned0"][1] == angles.series["tuned1"][0]
    assert [len(row) for row in parts["Tensors"].tables[0].rows] == [5] * 7
    shares = parts["Magnitudes"].charts[0].series["tuned0"]
    assert sum(value for value in shares if value is not None) == pytest.approx(1)
    assert all(chart.alt for section in parts.values() for chart in section.charts if isinstance(chart, Chart))


def test_one_model_without_spectra(models):
    base, folders = models
    found = pymerge.inspect(str(base), [str(folders[0])], spectra=False)
    assert "Between models" not in [section.heading for section in sections(found)]
    assert html_of("t", subtitle(found), sections(found))


def test_no_torch_without_spectra(models):
    base, folders = models
    code = f"""
import sys
sys.argv = {["pymerge", "inspect", str(base), *map(str, folders), "--no-spectra", "--quiet"]!r}
from pymerge.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules and "scipy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors_come_before_the_work(models, tmp_path):
    base, folders = models
    done = run(base, tmp_path / "gone")
    assert done.exit_code == 2 and "gone" in done.output
    (tmp_path / "file").write_text("")
    done = run(base, folders[0], "--json", tmp_path / "file" / "x.json")
    assert done.exit_code == 5 and "cannot be written" in done.output
    assert run(base, folders[0], "-o", tmp_path).exit_code == 5


def test_names_do_not_reach_the_terminal_or_the_page_raw(capsys):
    hostile = "x\x1b[31m</script><img src=y onerror=alert(1)>\n[bold]"
    base = {hostile: torch.ones(4, 4), "other": torch.ones(2)}
    found = pymerge.inspect(base, [{hostile: torch.ones(4, 4) * 2, "other": torch.ones(3)}], rank=2)
    page = html_of("t", subtitle(found), sections(found))
    assert "<img" not in page and "\x1b" not in page
    from pymerge.report.inspect_text import show

    show(found)
    assert "\x1b[31m" not in capsys.readouterr().out


def large(layers, tasks, experts=0):
    """An inspection of a model of many tensors, without its bytes."""
    rng = np.random.default_rng(0)
    kinds = ["q", "k", "v", "o", "gate", "up", "down"] + [f"experts.{e}.up" for e in range(experts)]
    tensors = []
    for layer in range(layers):
        for kind in kinds:
            d = rng.standard_normal((tasks, 64))
            signs = np.sign(d)
            moments = Moments(
                entries=64,
                base=64.0,
                l1_of_sum=float(abs(d.sum(0)).sum()),
                gram=d @ d.T,
                l1=abs(d).sum(1),
                octaves=rng.integers(1, 50, (tasks, OCTAVES)),
                both=np.full((tasks, tasks), 64),
                opposed=(signs[:, None] * signs[None] < 0).sum(-1),
                contested=64,
                conflicted=50,
            )
            values = tuple(tuple(np.sort(rng.random(16))[::-1].tolist()) for _ in range(tasks))
            overlaps = {
                (s, t): Overlap(16, (0.5,) * 16, (0.5,) * 16) for s in range(tasks) for t in range(s + 1, tasks)
            }
            name = f"model.layers.{layer}.{kind}.weight"
            spectrum = Spectrum(name, (8192, 8192), values, (9.0,) * tasks, (16,) * tasks, overlaps)
            tensors.append(TensorFound(name, (8192, 8192), moments, (spectrum,)))
    return Inspection(
        base="base",
        models=tuple(f"models/{t}" for t in range(tasks)),
        tensors=tuple(tensors),
        left_out={},
        notes=(),
        rank=16,
        bytes_read=0,
        seconds=0.0,
    )


@pytest.mark.parametrize("size", [{"layers": 80, "tasks": 8}, {"layers": 40, "tasks": 3, "experts": 64}], ids=str)
def test_pages_of_large_models_are_small(size):
    """A 70B model's 80 layers with 8 models; a mixture's 2840 matrices."""
    found = large(**size)
    page = html_of("t", subtitle(found), sections(found))
    assert len(page) < 5_000_000
    longest = max(len(table.rows) for section in sections(found) for table in section.tables)
    assert longest <= TENSORS_SHOWN


def test_models_of_one_name_are_told_apart():
    assert short_names(["a/math", "a/code/"]) == ["math", "code"]
    assert short_names(["a/x", "b/x"]) == ["a/x", "b/x"]
    assert short_names(["x", "x"]) == ["1: x", "2: x"]


def test_command_is_listed():
    done = subprocess.run(
        [sys.executable, "-m", "pymerge", "inspect", "--help"],
        capture_output=True,
        text=True,
        env=os.environ,
        check=True,
    )
    assert "--no-spectra" in done.stdout
