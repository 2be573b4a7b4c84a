"""The comparisons with single libraries at tiny sizes: every row is made, and results agree. What a peer's environment
is needed for skips where there is none."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "side_by_side"
PEERS = FOLDER.parents[1] / ".venv-peers"


def quick_rows(script: str, out: Path, *options: str) -> list[dict]:
    """A process of its own, as the comparisons pin themselves to processors."""
    command = [sys.executable, str(FOLDER / script), "--quick", "--json", str(out), *options]
    path = os.pathsep.join([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(out.read_text())


@pytest.fixture
def peer_tools(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("peer_tools")


def test_plain_pytorch(tmp_path):
    rows = quick_rows("against_pytorch.py", tmp_path / "rows.json")
    assert {row["method"].split(":")[0] for row in rows} >= {"esm", "pave", "regmean", "ace", "svc", "tsv_m", "mudsc"}
    assert all(row["agrees"] and row["pymerge"]["cpu"] and row["opponents"] for row in rows)


def test_adapters(tmp_path):
    pytest.importorskip("peft")
    rows = quick_rows("against_peft.py", tmp_path / "rows.json", "--work", str(tmp_path))
    assert [row["method"].split()[0] for row in rows][:2] == ["cat", "svd"]
    assert all(row["agrees"] for row in rows)
    assert all(row["difference"] < 1e-5 for row in rows if row["difference"] is not None)


@pytest.mark.skipif(not (PEERS / "lapx").is_dir(), reason="the speed suite's environment .venv-peers is not there")
def test_assignment(tmp_path):
    rows = quick_rows("against_assignment.py", tmp_path / "rows.json", "--kinds", "planted,integers")
    assert all(row["agrees"] and len(row["opponents"]) == 6 for row in rows)


@pytest.mark.skipif(not PEERS.is_dir(), reason="the speed suite's environment .venv-peers is not there")
def test_sd_mecha(tmp_path):
    options = ("--methods", "ties", "--work", str(tmp_path))
    (row,) = quick_rows("against_sd_mecha.py", tmp_path / "rows.json", *options)
    assert row["agrees"] and row["difference"] < 1e-5
    assert row["pymerge"]["written"] > 0


def test_turns_are_counted_and_first_results_kept(peer_tools):
    calls = []
    runs, results = peer_tools.take_turns({"one": lambda: calls.append(1) or len(calls)}, 3)
    assert results == {"one": 1}  # of the first call
    assert len(runs["one"].cpu) == 3 and len(calls) > 3  # short: many calls a turn


def test_floors(peer_tools):
    peaks = peer_tools.Peaks(single=2.0, double=1.0, half=4.0, copy=8.0)
    assert peaks.floor(single=4e9, double=1e9).cpu == [3.0]
    assert peaks.copied(16e9).cpu == [2.0]
