"""`pymerge report`: what of merge.json is on the page."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import pymerge
from pymerge.errors import InputError
from pymerge.report.diagnostics import diagnostics
from pymerge.report.merge_page import merge_sections, report
from tests.models import tuned_from, write_model
from tests.report.pages import HOSTILE, summary_of_a_large_merge

PROJECTIONS = ("q_proj", "up_proj")


def model_tensors(name: str = "extra.weight") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{n}.{kind}.weight" for n in range(3) for kind in PROJECTIONS] + [name]
    return {name: torch.randn(24, 16, generator=generator) for name in names}


@pytest.fixture
def merged(tmp_path):
    """Merges two small models by a method and its keywords; returns the folder."""

    def merge(method: str, name: str = "extra.weight", **keywords):
        base = model_tensors(name)
        write_model(tmp_path / "base", base)
        models = [write_model(tmp_path / label, tuned_from(base, seed)) for seed, label in enumerate(("math", "code"))]
        out = tmp_path / "out"
        pymerge.merge(tmp_path / "base", models, method=method, out=out, **keywords)
        return out

    return merge


def found(sections, heading):
    (section,) = [section for section in sections if section.heading == heading]
    return section


def rows(table) -> dict:
    return {row[0]: row[1:] for row in table.rows}


def test_overview_recipe_and_checksums(merged):
    out = merged("tsv_m", calibrate="svc")
    title, subtitle, sections = merge_sections(out)
    summary = json.loads((out / "merge.json").read_text())
    assert title == "Merge report: out" and subtitle.startswith("tsv_m + svc, by pymerge ")
    overview = found(sections, "Overview")
    assert rows(overview.tables[0])["tensors merged"] == (7,)
    (busy,) = overview.charts
    assert list(busy.x) == ["read", "compute", "write"] and summary["busy_seconds"]["compute"] > 0
    assert busy.series["seconds"] == [summary["busy_seconds"][stage] for stage in busy.x]
    assert "merge_method: tsv_m" in found(sections, "Recipe").text[0]
    assert [row[1] for row in found(sections, "Recipe").tables[0].rows] == ["model.safetensors"] * 3
    sums = rows(found(sections, "Checksums").tables[0])
    assert sums == {name: (crc,) for name, crc in summary["checksums"].items()}
    assert "No check was relaxed." in found(sections, "Relaxed checks and notes").text


def test_facts_of_a_spectral_merge_are_drawn_over_depth(merged):
    out = merged("task_arithmetic", calibrate="svc")
    summary = json.loads((out / "merge.json").read_text())
    sections = merge_sections(out)[2]
    facts = summary["per_tensor"]
    (chart,) = [c for c in found(sections, "Diagnostics").charts if c.title == "SVC: mean divisor"]
    assert chart.kind == "heatmap" and list(chart.x) == ["0", "1", "2"] and list(chart.series) == list(PROJECTIONS)
    for kind, values in chart.series.items():
        assert values == [facts[f"model.layers.{n}.{kind}.weight"]["svc_eta_mean"] for n in range(3)]
    every = found(sections, "Diagnostics by tensor").tables[0]
    assert {row[0] for row in every.rows} == set(facts)
    (spectra,) = found(sections, "Spectra before and after calibration").charts
    assert list(spectra.x) == ["1", "2", "4", "8", "16"]
    for key in ("before", "after"):
        parts = [own[f"svc_{key}"][1] / own["svc_before"][0] for own in facts.values()]
        assert spectra.series[key][1] == pytest.approx(sum(parts) / len(parts))


def test_relaxations_and_notes(tmp_path):
    _, _, sections = merge_sections(summary_of_a_large_merge(tmp_path, layers=2))
    care = found(sections, "Relaxed checks and notes")
    assert rows(care.tables[0]) == {"nonfinite": ("keep",)} and care.text == [
        "no weight matrices, merged without the steps for these"
    ]


def test_lists_are_drawn_by_model_and_what_is_the_same_is_said_once():
    facts = {
        f"layers.{n}.a.weight": {"pave_ranks": [10 + n, 20], "branch": "ab"[n % 2], "alpha": 0.5, "few_rows": [1]}
        for n in range(4)
    } | {"head": {"pave_ranks": [1, 1], "alpha": 0.5}}
    first, *_ = diagnostics(facts, ["math", "code"])
    (chart,) = first.charts
    assert chart.kind == "line" and chart.series == {"math": [10, 11, 12, 13], "code": [20, 20, 20, 20]}
    same, cases = first.tables
    assert rows(same)["alpha"][:2] == (0.5, 5)
    assert [row[:3] for row in cases.rows] == [("ACE: branch", "a", 2), ("ACE: branch", "b", 2)]


def test_parts_and_experts_have_rows_of_their_own_and_experts_share_a_row_of_the_chart():
    facts = {
        "layers.0.qkv": {"parts": [{"gamma": 1.0}, {"gamma": 3.0}]},
        "layers.1.experts.0.up": {"gamma": 2.0},
        "layers.1.experts.1.up": {"gamma": 4.0},
        "layers.1.stacked": {"7": {"gamma": 5.0}},
    }
    first, *others = diagnostics(facts, [])
    chart = first.charts[0]
    assert chart.title == "ACE: gamma" and chart.series == {
        "qkv[0]": [1, None],
        "qkv[1]": [3, None],
        "experts.*.up": [None, 3],
        "stacked/7": [None, 5],
    }
    names = [row[0] for row in others[-1].tables[0].rows]
    assert names == [
        "layers.0.qkv[0]",
        "layers.0.qkv[1]",
        "layers.1.experts.0.up",
        "layers.1.experts.1.up",
        "layers.1.stacked/7",
    ]


def test_nothing_noted_is_no_section(merged):
    headings = [section.heading for section in merge_sections(merged("ties"))[2]]
    assert headings == ["Overview", "Recipe", "Relaxed checks and notes", "Checksums"]


def test_an_alignment_is_compared_before_and_after(tmp_path):
    out = summary_of_a_large_merge(tmp_path, layers=2)
    summary = json.loads((out / "merge.json").read_text())
    group = {"units": 8, "moved": [6, 7], "before": [0.1, 0.3], "after": [0.8, 0.9], "gap": [0.0, 0.0]}
    summary["align"] = {"before": 0.2, "after": 0.85, "sweeps": 3, "groups": {"layer.0": group}}
    (out / "merge.json").write_text(json.dumps(summary))
    section = found(merge_sections(out)[2], "Alignment")
    assert section.charts[0].series == {"before": [pytest.approx(0.2)], "after": [pytest.approx(0.85)]}
    assert section.tables[0].rows[0][:3] == ("layer.0", 8, "6, 7")
    del summary["align"]["before"], group["before"], group["moved"]  # of a zip
    (out / "merge.json").write_text(json.dumps(summary))
    section = found(merge_sections(out)[2], "Alignment")
    assert section.charts[0].series == {"after": [pytest.approx(0.85)]}
    assert section.tables[0].rows[0] == ("layer.0", 8, None, None, pytest.approx(0.85))


def test_a_large_model_is_a_small_page(tmp_path):
    pytest.importorskip("plotly")
    report(summary_of_a_large_merge(tmp_path / "out"), tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 5_000_000


def test_a_hostile_tensor_name_is_merged_and_shown(merged, tmp_path):
    pytest.importorskip("plotly")
    out = merged("tsv_m", name=HOSTILE[1])
    report(out, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "window.hacked" not in page.replace("&lt;script&gt;window.hacked=1&lt;/script&gt;", "")
    assert HOSTILE[1] in rows(found(merge_sections(out)[2], "Checksums").tables[0])


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no merge.json here"),
        ("[1", "merge.json"),
        ('{"pymerge": "0.1.0"}', "not as pymerge 0.1.0 writes it .KeyError: 'recipe'"),
        ('{"pymerge": "0.1.0", "recipe": 3}', "not as pymerge 0.1.0 writes it"),
    ],
)
def test_what_is_no_summary_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "merge.json").write_text(text)
    with pytest.raises(InputError, match=message):
        report(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_command_writes_the_page_and_the_pictures(tmp_path):
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    out = summary_of_a_large_merge(tmp_path / "out", layers=0)
    options = ["-o", tmp_path / "page.html", "--png", tmp_path / "png", "--svg", tmp_path / "svg"]
    command = [sys.executable, "-m", "pymerge", "report", out, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = [tmp_path / name for name in ("page.html", "png/01-busy-seconds.png", "svg/01-busy-seconds.svg")]
    assert done.stdout.split("\n")[:-1] == [str(path) for path in written]
    assert all(path.stat().st_size > 1000 for path in written)
