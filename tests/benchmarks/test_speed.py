"""The speed suite without its peers: rows, what they are judged by, tables, and the steps around the programs."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

yaml = pytest.importorskip("yaml")
pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "benchmarks" / "side_by_side"
sys.path[:0] = [str(SUITE), str(SUITE.parent)]  # the scripts are started from there, and import each other

import against_mergekit as merge  # noqa: E402
import agreement  # noqa: E402
import checkpoints  # noqa: E402
import layer_inputs  # noqa: E402
import rows  # noqa: E402
import speed_tables as tables  # noqa: E402
import tools  # noqa: E402
from rows import Row, Runs  # noqa: E402
from structured import vit_blocks, write_models  # noqa: E402

import pymerge  # noqa: E402


def script(name: str):
    """Under a name of its own: `run` and the name of the library would hide others."""
    spec = importlib.util.spec_from_file_location(f"speed_{name}", SUITE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


suite, fusion_bench = script("run"), script("against_fusion_bench")


def row(method: str = "ties", ours: float = 1.0, theirs: float = 4.0, **rest) -> Row:
    values = {"peer": "mergekit", "setting": "1 GB a model, float32", "measure": "wall", "agrees": True}
    opponents = {"slow 1.0": runs(3 * theirs), "quick 2.0": runs(theirs)}
    values |= {"compared": "all", "pymerge": runs(ours), "opponents": opponents, "floors": {"copy": runs(ours / 2)}}
    return Row(**(values | {"method": method, "difference": 2e-6} | rest))


def runs(seconds: float) -> Runs:
    times = [seconds * 1.5, seconds, seconds * 0.5]
    return Runs(wall=times, cpu=[2 * time for time in times], rss=int(5e8), read=1000, written=None)


def part(*found: Row, **rest) -> dict:
    values = {"processor": "Abacus", "commit": "abc1234", "date": "2026-01-01", "python": "3.11", "torch": "2.13"}
    return values | {"quick": False, "seconds": 9, "load": [0.0, 1.0], "others": 0.0, "rows": list(found)} | rest


def test_ratio_is_to_the_strongest_opponent():
    fast, slow = row(), row(ours=5.0)
    assert fast.strongest()[0] == "quick 2.0" and fast.ratio() == 4.0 and not fast.slower()
    assert slow.ratio() == 0.8 and slow.slower()
    assert not row(ours=4.04).slower()  # medians of a few runs do not tell these apart
    assert row(measure="cpu").seconds(row().pymerge) == 2.0


def test_rows_come_back_from_their_file(tmp_path):
    found = [row(), row("slerp", difference=None, note="2 models")]
    rows.save(tmp_path / "new" / "rows.json", found)
    assert rows.load(tmp_path / "new" / "rows.json") == found


def test_slower_rows_get_their_cause_and_are_reported_without_one(monkeypatch, tmp_path):
    (tmp_path / "causes.json").write_text(json.dumps({"mergekit: slerp": "sums in float64"}))
    monkeypatch.setattr(suite, "HERE", tmp_path)
    given = [row("slerp", ours=9.0, cause="old"), row("ties", ours=9.0), row("linear", ours=9.0, cause="own"), row()]
    found = suite.explained(given)
    assert [one.cause for one in found] == ["sums in float64", "", "own", ""]
    wrong = row("ram", agrees=False)
    assert suite.problems({"mergekit": part(*found, wrong)}) == [
        "mergekit, ties: slower than quick 2.0, and no cause is given",
        "mergekit, ram: results differ",
    ]
    assert suite.problems({"mergekit": part(*found, quick=True)}) == []  # start-up is all that tiny sizes measure


def test_every_stated_cause_is_of_a_comparison_that_exists():
    causes = json.loads((SUITE / "causes.json").read_text())
    assert {name.split(":")[0] for name in causes} <= set(suite.COMPARISONS)


def test_readme_table_has_the_strongest_opponent_and_the_remarks():
    other = row("slerp", setting="4 GB a model, float32", difference=None, note="2 models")
    text = "\n".join(tables.short(part(row(), other, row("linear", ours=40.0))))
    assert "| method | pymerge | quick 2.0 | ratio | peak memory | opponent's | results differ by |  |" in text
    assert "| ties | 1 s | 4 s | 4 x | 500 MB | 500 MB | 2e-06 |  |" in text
    assert "| slerp (4 GB a model) | 1 s | 4 s | 4 x | 500 MB | 500 MB | same distribution | 2 models |" in text
    assert "| linear | 40 s | 4 s | 0.1 x | 500 MB | 500 MB | 2e-06 | SLOWER, NOT EXPLAINED |" in text
    assert "Abacus" in text and "no other work" in text
    assert "beside other work that took 30 % of the processors" in tables.provenance(part(others=0.3))


def test_many_settings_of_a_method_share_a_line():
    many = [row(ours=1.0 + n, theirs=4.0, setting=f"{n} GB a model", difference=n * 1e-6) for n in range(3)]
    text = "\n".join(tables.short(part(*many, row("slerp"))))
    assert "| ties (3 settings) | 1 s to 3 s | 4 s | 1.3 x to 4 x | 500 MB | 500 MB | 2e-06 |" in text
    assert "| slerp (1 GB a model, float32) |" in text


def test_whole_table_has_every_program_and_no_empty_column():
    text = tables.markdown({"mergekit": part(row())})
    assert "| slow 1.0 | 12 s (6 s to 18 s) | 24 s (12 s to 36 s) | 12.00 x |" in text
    assert "| copy | 500 ms (250 ms to 750 ms) | 1 s (500 ms to 1.5 s) | 2.00 x the floor |" in text
    assert " read |" in text and "written" not in text.split("##")[1]


@pytest.mark.parametrize(
    ("seconds", "text"), [(123.4, "123 s"), (1.234, "1.23 s"), (0.0456, "45.6 ms"), (7.8e-5, "78 us"), (0.0, "0 us")]
)
def test_seconds(seconds, text):
    assert tables.seconds(seconds) == text


def test_readme_is_written_between_its_markers_alone(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    for _ in range(2):
        tables.write_readme(path, {"mergekit": part(row())})
    text = path.read_text()
    assert text.startswith(f"before\n{tables.BEGIN}\nAgainst mergekit") and text.endswith(f"\n{tables.END}\nafter\n")
    assert "old" not in text and text.count("| ties |") == 1
    path.write_text("no markers")
    with pytest.raises(ValueError):
        tables.write_readme(path, {"mergekit": part(row())})
    assert path.read_text() == "no markers"


def test_readme_has_the_markers_once():
    text = (ROOT / "README.md").read_text()
    assert text.count(tables.BEGIN) == text.count(tables.END) == 1 and text.index(tables.BEGIN) < text.index(tables.END)


def test_results_in_the_repository_are_measurements_that_make_their_tables():
    if not suite.RESULTS.is_file():
        pytest.skip("no results yet")
    report = suite.load(suite.RESULTS)
    assert list(report) == [peer for peer in suite.COMPARISONS if peer in report]
    assert suite.RESULTS.with_suffix(".md").read_text() == tables.markdown(report)


def test_suite_runs_scripts_and_keeps_the_rows_of_the_others(monkeypatch, tmp_path):
    writes = f"import sys; sys.path.insert(0, {str(SUITE)!r}); import rows, argparse; from pathlib import Path\n"
    writes += (
        "args = rows.arguments(None, 'x').parse_args(); found = rows.load(Path(sys.argv[0]).with_suffix('.json'))\n"
    )
    (tmp_path / "good.py").write_text(writes + "rows.save(args.json, found)")
    rows.save(tmp_path / "good.json", [row("linear")])
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    (tmp_path / "causes.json").write_text("{}")
    monkeypatch.setattr(suite, "HERE", tmp_path)
    monkeypatch.setattr(suite, "REPOSITORY", tmp_path)
    monkeypatch.setattr(suite, "COMPARISONS", {"mergekit": "good.py", "fusion_bench": "bad.py"})
    out = tmp_path / "results" / "speed.json"

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["run.py", "--json", str(out), *arguments])
        return suite.main()

    assert run("--peers", "mergekit") == 0
    assert run("--peers", "fusion_bench", "--quick") == 1
    report = suite.load(out)
    assert list(report) == ["mergekit"] and report["mergekit"]["rows"] == [row("linear")]
    assert not report["mergekit"]["quick"]
    assert len(report["mergekit"]["load"]) == 2 and 0 <= report["mergekit"]["others"] <= 1
    assert "| linear |" in out.with_suffix(".md").read_text()
    assert run("--peers", "mergekit", "--quick") == 0 and suite.load(out)["mergekit"]["quick"]
    rows.save(tmp_path / "good.json", [row("linear", ours=9.0)])
    assert run("--peers", "mergekit") == 1
    (tmp_path / "causes.json").write_text(json.dumps({"mergekit: linear": "waits for the disk"}))
    assert run("--tables") == 0 and "waits for the disk" in out.with_suffix(".md").read_text()


def test_every_method_of_the_parity_run_is_timed():
    recipes = [yaml.safe_load(path.read_text()) for path in (SUITE / "parity").glob("*.yml")]
    assert {recipe["merge_method"] for recipe in recipes} & set(pymerge.methods.list("combine")) == set(tools.METHODS)


def test_a_run_is_measured_with_its_bytes(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "model.safetensors").write_bytes(os.urandom(3 << 20))
    cost = tools.run(tools.synced_copy_command(source, out), out, 1)
    assert (out / "model.safetensors").stat().st_size == 3 << 20
    assert cost.wall > 0 and cost.rss > 0 and cost.cpu >= 0
    tools.evict([source])
    tools.warm([source])
    with pytest.raises(RuntimeError, match="exit status 1"):
        tools.run(tools.copy_command(tmp_path / "none", out), out, 1)


def test_mergekit_rows_say_what_was_compared():
    found = dict.fromkeys((merge.OURS, merge.THEIRS, *merge.FLOORS), runs(1.0))
    exact = merge.row("slerp", "tiny", found, {"agrees": True, "error": 1e-6, "mergekit_error": 2e-4}, 0.06)
    assert exact.difference == 1e-6 and exact.note == "2 models" and "in float64 (mergekit: 2e-04)" in exact.compared
    drawn = merge.row("dare_ties", "tiny", found, {"agrees": False}, 0.06)
    assert drawn.difference is None and not drawn.agrees and drawn.note == ""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A base and four models of two narrow layers."""
    root = tmp_path_factory.mktemp("tiny")
    narrow = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_attention_heads": 4, "vocab_size": 64}
    config = checkpoints.model_config(0.01) | narrow | {"num_hidden_layers": 2, "num_key_value_heads": 2}
    for model, name in enumerate(("base", *tools.TASKS, "m4")):
        checkpoints.write_model(root / name, config, model, 1 << 30)
    return root


@pytest.mark.parametrize("method", sorted(tools.METHODS))
def test_recipes_are_merged_and_their_results_compared(method, tiny, tmp_path):
    """pymerge's own output stands in for mergekit's; another output differs."""
    found, other = tmp_path / "found", tmp_path / "other"
    recipe = tools.write_recipe(tiny, method, "float32")
    pymerge.Recipe.from_yaml(recipe).run(out=found)
    assert agreement.compare_method(tiny, method, found, found)["agrees"]
    recipe.write_text(recipe.read_text().replace(str(tiny / "m1"), str(tiny / "m4")))
    pymerge.Recipe.from_yaml(recipe).run(out=other)
    if method not in tools.RANDOM:
        assert not agreement.compare_method(tiny, method, found, other)["agrees"]


def test_iterations_are_extrapolated_by_a_line():
    first, last = fusion_bench.STEPS
    cost = {"cpu": 5.0 + 2.0 * last, "wall": 7.0 + 3.0 * last, "rss": 10, "growth": 4}
    less = {"cpu": 5.0 + 2.0 * first, "wall": 7.0 + 3.0 * first, "rss": 11, "growth": 3}
    found = fusion_bench.runs([[less, cost]])
    assert found.cpu == [pytest.approx(5.0 + 2.0 * fusion_bench.FULL_STEPS)]
    assert found.wall == [pytest.approx(7.0 + 3.0 * fusion_bench.FULL_STEPS)]
    assert (found.rss, found.growth) == (11, 4)


def test_regmean_is_given_the_moments_of_every_layer(tmp_path):
    entries = vit_blocks(1, 16)
    write_models(tmp_path, entries, 2, "F32")
    layer_inputs.write(tmp_path, entries, 2)
    grams = layer_inputs.load(tmp_path, 2)
    names = {name.removesuffix(".weight") for name, shape in entries if len(shape) == 2}
    assert layer_inputs.modules(grams[0]).keys() == names
    found = layer_inputs.statistics(grams[1])
    name = "vision_model.encoder.layers.0.self_attn.v_proj"
    expected = grams[1][layer_inputs.holder(name)].double().numpy()
    assert np.linalg.eigvalsh(expected)[0] > 0.01
    np.testing.assert_allclose(found[name].second_moment().numpy() / found[name].rows, expected, rtol=1e-6)
