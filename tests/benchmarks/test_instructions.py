"""The check of instruction counts fails where it must and only there; the counting itself is `make instructions`."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("instruction_count", ROOT / "benchmarks" / "instructions" / "count.py")
assert SPEC is not None and SPEC.loader is not None
counting = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(counting)

NOW = {"toolchain": "g++ 12, valgrind 3, glibc 2", "instructions": {"merge": 1100, "kth": 500}}


def baseline(**instructions: int) -> dict:
    return {"toolchain": NOW["toolchain"], "instructions": instructions}


def test_up_to_a_tenth_more_passes(capsys):
    assert counting.check(baseline(merge=1000, kth=900), NOW) == 0
    assert "merge: baseline 1,000, now 1,100 instructions (+10.0%)" in capsys.readouterr().out


def test_more_fails_and_says_how_to_accept(capsys):
    assert counting.check(baseline(merge=999, kth=500), NOW) == 1
    failed = capsys.readouterr().out.split("FAILED")[1]
    assert "merge: baseline 999, now 1,100 instructions (+10.1%)" in failed
    assert "make instructions ACCEPT=1" in failed
    assert "kth" not in failed


def test_a_kernel_that_only_one_side_has_fails(capsys):
    assert counting.check(baseline(merge=1100), NOW) == 1
    assert "kth: 500 instructions, not in the baseline" in capsys.readouterr().out
    assert counting.check(baseline(merge=1100, kth=500, gram=7), NOW) == 1
    assert "gram: in the baseline, not counted now" in capsys.readouterr().out


def test_another_compiler_is_only_reported(capsys):
    other = {"toolchain": "g++ 13, valgrind 3, glibc 2", "instructions": {"merge": 1, "kth": 1}}
    assert counting.check(other, NOW) == 0
    told = capsys.readouterr().out
    assert "only reported" in told and "g++ 13" in told and "g++ 12" in told


@pytest.mark.parametrize(
    ("name", "answer", "told"),
    [("machine", "aarch64", "Linux on aarch64"), ("system", "Darwin", "Darwin on x86_64")],
)
def test_another_machine_counts_nothing(monkeypatch, capsys, name, answer, told):
    monkeypatch.setattr(counting.platform, "system", lambda: "Linux")
    monkeypatch.setattr(counting.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(counting.platform, name, lambda: answer)
    monkeypatch.setattr(sys, "argv", ["count.py"])
    assert counting.main() == 0
    assert told in capsys.readouterr().out


def test_without_valgrind_nothing_is_counted(monkeypatch, capsys):
    monkeypatch.setattr(counting.platform, "system", lambda: "Linux")
    monkeypatch.setattr(counting.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(counting.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["count.py"])
    assert counting.main() == 0
    assert "not counted: valgrind is not installed" in capsys.readouterr().out


def test_what_is_measured_is_accepted_and_then_checked(monkeypatch, tmp_path):
    file = tmp_path / "baseline.json"
    monkeypatch.setattr(counting, "measure", lambda: NOW)
    monkeypatch.setattr(sys, "argv", ["count.py", "--accept", "--baseline", str(file)])
    assert counting.main() == 0
    assert json.loads(file.read_text()) == NOW
    monkeypatch.setattr(sys, "argv", ["count.py", "--baseline", str(file)])
    assert counting.main() == 0
    file.write_text(json.dumps(baseline(merge=900, kth=500)))
    assert counting.main() == 1


def test_flags_are_those_of_the_build():
    assert "-O3" in counting.flags() and "-ffp-contract=off" in counting.flags() and "-Wall" in counting.flags()


def test_baseline_and_driver_name_the_same_kernels():
    saved = json.loads(counting.BASELINE.read_text())
    assert saved["toolchain"].startswith("g++")
    driver = (ROOT / "benchmarks" / "instructions" / "driver.cpp").read_text()
    assert [name for name in saved["instructions"] if f'"{name}"' not in driver] == []
