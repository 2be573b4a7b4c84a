"""What runs on a GPU machine, as far as it runs without one: small sizes on the CPU, and the script with a stand-in for
Python."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def load(monkeypatch):
    """Imports a script of benchmarks/ as it is when it runs there."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    return module.main()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """A folder with what merges and methods of tiny sizes left, on the CPU."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        merges, methods = (importlib.import_module(name) for name in ("device_merge", "bench_cuda_methods"))
        patch.setitem(
            merges.SHAPES, "tiny", replace(merges.SHAPES["tiny"], merges=("task_arithmetic", "ties", "tsv_m + svc"))
        )
        out = folder / "device_merge_1b.json"
        assert run(patch, merges, "--device", "cpu", "--shape", "tiny", "--out", out) == 0
        patch.setattr(methods, "SHAPES", ((2048, 2048), (2048, 8192)))
        out = folder / "cuda_methods.json"
        assert run(patch, methods, "--device", "cpu", "--shrink", 64, "--out", out) == 0
    return folder


def test_whole_merges(load, reports):
    script, report = load("device_merge"), json.loads((reports / "device_merge_1b.json").read_text())
    rows = report["merges"]
    assert [row["merge"] for row in rows if row["device"] == "auto"] == ["task_arithmetic", "ties", "tsv_m + svc"]
    assert all(row["distance"] == 0 and row["right"] for row in rows if row["by"] == "pymerge")
    plain = {row["merge"]: row["distance"] for row in rows if row["by"] == "plain PyTorch"}
    assert plain["task_arithmetic"] < 1e-3 and plain["ties"] < 0.05  # bfloat16: many entries at the threshold
    assert report["layers"] == 2 and report["model_bytes"] == 2 * script.parameters(script.SHAPES["tiny"].config)


def test_merges_that_differ_fail_and_late_ones_are_left_out(monkeypatch, load, tmp_path):
    script, out = load("device_merge"), tmp_path / "out.json"
    monkeypatch.setitem(script.SHAPES, "tiny", replace(script.SHAPES["tiny"], merges=("dare_linear",)))
    monkeypatch.setattr(script, "distance", lambda *_: 1e-9)
    assert run(monkeypatch, script, "--device", "cpu", "--shape", "tiny", "--out", out) == 1
    assert run(monkeypatch, script, "--device", "cpu", "--shape", "tiny", "--seconds", "0", "--out", out) == 0
    assert json.loads(out.read_text())["merges"] == [{"merge": "dare_linear", "error": "left out: no time"}]


def test_a_merge_that_fails_leaves_the_others(monkeypatch, load, tmp_path):
    script, out = load("device_merge"), tmp_path / "out.json"
    monkeypatch.setitem(
        script.SHAPES, "tiny", replace(script.SHAPES["tiny"], merges=("ace", "ties"), reference=("ties",))
    )
    monkeypatch.setitem(script.SPECTRAL, "ace", {"method": "no_such_method"})
    assert run(monkeypatch, script, "--device", "cpu", "--shape", "tiny", "--out", out) == 1
    failed, *others = json.loads(out.read_text())["merges"]
    assert "no_such_method" in failed["error"] and not failed["right"]
    assert [row["merge"] for row in others] == 3 * ["ties"]


def test_models_shrink_to_the_disk(monkeypatch, load, tmp_path):
    script = load("device_merge")
    shape = script.SHAPES["7b"]
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**30))
    assert script.fitting(shape, tmp_path) == shape
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: SimpleNamespace(free=30e9))
    fitted = script.fitting(shape, tmp_path)
    assert 14 <= fitted.config["num_hidden_layers"] <= 17
    assert 2 * script.parameters(fitted.config) * 4 <= 29e9
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: SimpleNamespace(free=3e9))
    with pytest.raises(SystemExit, match=r"53.9 GB are needed, 2.0 GB are free"):
        script.fitting(shape, tmp_path)


def test_models_are_updates_of_a_base(load, tmp_path):
    models = load("device_models")
    config = models.llama(64, 96, 1, heads=4, kv_heads=2, vocabulary=50, tied=True)
    models.make(tmp_path, config, 2, "cpu")
    from safetensors.torch import load_file

    base, m1, m2 = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "m1", "m2"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert base[name].dtype == torch.bfloat16 and "lm_head.weight" not in base
    assert float(base[name].float().std()) == pytest.approx(0.02, rel=0.1)
    updates = [(m[name].float() - base[name].float()).flatten() for m in (m1, m2)]
    assert float(updates[0].std()) == pytest.approx(1e-3, rel=0.3)
    assert 0.2 < float(torch.corrcoef(torch.stack(updates))[0, 1]) < 0.6  # what tasks share is 0.4 of the energy


def test_methods_agree_with_their_plain_formulations(reports):
    rows = json.loads((reports / "cuda_methods.json").read_text())["methods"]
    assert [row["method"] for row in rows] == 2 * ["svc", "tsv_m", "esm", "pave", "ace"]
    for row in rows:
        apart = {name: other["distance"] for name, other in row["others"].items() if name != "svd_lowrank"}
        assert len(apart) == 1 and all(value < 1e-3 for value in apart.values()), row
    assert rows[1]["others"]["svd_lowrank"]["distance"] < 1


def test_methods_leave_out_what_is_late(monkeypatch, load, tmp_path):
    script, out = load("bench_cuda_methods"), tmp_path / "out.json"
    monkeypatch.setattr(script, "SHAPES", ((64, 64),))
    assert run(monkeypatch, script, "--device", "cpu", "--seconds", 0, "--out", out) == 0
    assert {row["error"] for row in json.loads(out.read_text())["methods"]} == {"left out: no time"}


def test_a_method_that_fails_leaves_the_others(monkeypatch, load, tmp_path):
    script, out = load("bench_cuda_methods"), tmp_path / "out.json"

    def fail(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(script, "SHAPES", ((64, 64),))
    monkeypatch.setattr(script.TsvM, "combine", fail)
    monkeypatch.setattr(script.bench_pave, "released_pave", fail)
    assert run(monkeypatch, script, "--device", "cpu", "--out", out) == 1
    rows = {row["method"]: row for row in json.loads(out.read_text())["methods"]}
    assert rows["tsv_m"]["error"] == "RuntimeError: no kernel" and rows["ace"]["ms"] > 0
    assert rows["pave"]["others"] == {"cuSOLVER SVD, inverse": {"error": "RuntimeError: no kernel"}}


@pytest.mark.parametrize(("each", "runs"), [(3000.0, 1), (1.0, 5)])
def test_time_is_between_events_of_the_device(monkeypatch, load, each, runs):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return each

    script = load("bench_cuda_methods")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 700)
    result, cost = script.measured(lambda: torch.ones(1), "cuda")
    assert result.item() == 1 and cost == {"ms": each, "peak_bytes": 600, "runs": runs}


def test_the_table_shows_what_ran_on_a_gpu_alone(load, reports, tmp_path):
    script = load("gpu_table")
    assert script.markdown(tmp_path).count("not run") == len(script.SECTIONS)
    for name in ("device_merge_1b.json", "cuda_methods.json"):  # of the CPU: no run
        (tmp_path / name).write_text((reports / name).read_text())
    assert script.markdown(tmp_path).count("not run") == len(script.SECTIONS)
    for name in ("device_merge_1b.json", "cuda_methods.json"):
        (tmp_path / name).write_text((reports / name).read_text().replace('"device": "cpu"', '"device": "Some GPU"', 1))
    text = script.markdown(tmp_path)
    assert text.count("not run") == len(script.SECTIONS) - 2
    assert "Some GPU, torch" in text and "| ties | plain PyTorch | cpu |" in text
    assert "| esm | 32 x 128 |" in text and "cuSOLVER SVD" in text


def test_the_table_shows_kernels(load, tmp_path):
    script = load("gpu_table")
    shared = {"device": "Some GPU", "torch": "2.11"}
    copy = {"name": "copy", "ms": 0.1, "gb_per_s": 2000.0, "of_copy": 1.0}
    ties = {"name": "ties", "ms": 0.2, "gb_per_s": 1500.0, "of_copy": 0.75, "eager_ms": 4.0, "speedup": 20.0}
    (tmp_path / "cuda.json").write_text(json.dumps(shared | {"benchmarks": [copy, ties]}))
    svd = {"name": "svd", "ms": 2.0, "others": {"torch": {"ms": 8.0, "speedup": 4.0}, "cupy": {"error": "no memory"}}}
    late = {"name": "assign", "error": "left out: no time"}
    (tmp_path / "cuda_linalg.json").write_text(json.dumps(shared | {"benchmarks": [svd, late]}))
    text = script.markdown(tmp_path)
    for expected in (
        "| copy | 0.1 | 2000.0 | 1.0 | - | - |",
        "| ties | 0.2 | 1500.0 | 0.75 | 4.0 | 20.0 x |",
        "| svd | 2.0 | torch | 8.0 | 4.0 x |",
        "| svd | 2.0 | cupy | no memory | - |",
        "| assign | left out: no time | - | - | - |",
    ):
        assert expected in text


def test_the_committed_table_is_of_the_committed_results(load):
    script = load("gpu_table")
    assert (script.RESULTS / "gpu.md").read_text() == script.markdown(script.RESULTS)


STAND_IN = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in
  -) cat > /dev/null; [ -z "$NO_DEVICE" ] && echo 9.0a ;;
  "-c import cupy") exit 1 ;;
  *bench_cuda_methods*) exit "${METHODS:-0}" ;;
esac
"""


def check(tmp_path, *arguments, **environment):
    stand_in, calls = tmp_path / "python", tmp_path / "calls"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    calls.write_text("")
    environment = os.environ | {"PYTHON": str(stand_in), "CALLS": str(calls), "NO_DEVICE": ""} | environment
    command = ["bash", str(ROOT / "benchmarks" / "gpu_check.sh"), "--out", str(tmp_path / "out"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done, calls.read_text().splitlines()


@pytest.mark.parametrize(
    ("part", "scripts"),
    [
        ("kernels", ["bench_cuda.py", "bench_cuda_linalg.py", "bench_cov_accumulate.py", "--shape small"]),
        ("methods", ["bench_cuda_methods.py --seconds"]),
        ("1b", ["device_merge.py --shape 1b --seconds"]),
        ("7b", ["device_merge.py --shape 7b --seconds", "device_merge.py --shape 7b_4_layers --seconds"]),
    ],
)
def test_each_part_builds_and_runs_its_scripts(tmp_path, part, scripts):
    done, calls = check(tmp_path, "--part", part)
    assert done.returncode == 0, done.stdout + done.stderr
    assert any("setup.py build_ext --inplace" in call for call in calls)
    ran = [call for call in calls if call.startswith("benchmarks/") and "device_calls" not in call]
    assert len(ran) == len(scripts) and all(name in call for name, call in zip(scripts, ran, strict=True))
    steps = json.loads((tmp_path / "out" / f"cuda_check_{part}.json").read_text())["steps"]
    assert steps["build"]["result"] == "passed" and len(steps) > len(scripts)


def test_a_failed_step_fails_the_check(tmp_path):
    done, _ = check(tmp_path, "--part", "methods", METHODS="7")
    assert done.returncode == 1
    steps = json.loads((tmp_path / "out" / "cuda_check_methods.json").read_text())["steps"]
    assert steps["methods"]["result"] == "failed with 7"


def test_without_a_device_or_with_an_unknown_part_nothing_runs(tmp_path):
    done, calls = check(tmp_path, NO_DEVICE="1")
    assert done.returncode == 1 and calls == ["-"] and "no CUDA device" in done.stderr
    done, calls = check(tmp_path, "--part", "merges")
    assert done.returncode == 2 and calls == [] and "kernels, methods, 1b or 7b" in done.stderr
