"""S39, S41, S48, S49: kills, signals, too little memory, scheduling: the bytes are the same or there are none."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time

import pytest
import torch
import yaml

from tests.faults.kills import COMMAND, METHODS, SHAPES, checksums, killed_and_resumed
from tests.models import family, read_model, same


def recipe(tmp_path, method: str = "ties", **parameters) -> str:
    base, models = family(tmp_path, 3, SHAPES)
    path = tmp_path / "recipe.yaml"
    entry = {
        "base_model": str(base),
        "models": [{"model": str(m), "parameters": {"weight": 1.0, "density": 0.3}} for m in models],
        "merge_method": method,
        "parameters": parameters,
        "dtype": "bfloat16",
    }
    path.write_text(yaml.safe_dump(entry))
    return str(path)


def run(arguments, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_S39_killed_at_random_moments(tmp_path, method):
    counts = killed_and_resumed(tmp_path, method, 7, random.Random(0))
    assert counts["kills"] == counts["identical"] == counts["resumed"] + counts["complete"] and counts["resumed"] == 7


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_S41_signals_stop_and_say_how_to_go_on(tmp_path, number, code):
    path, out = recipe(tmp_path, "breadcrumbs"), tmp_path / "out"
    seen = 0
    for delay in (0.4, 0.5, 0.6, 0.7, 0.8, 0.35, 0.3, 0.9, 1.0):
        child = subprocess.Popen(
            [*COMMAND, path, str(out), "-q", "--memory", "250MB"], stderr=subprocess.PIPE, text=True
        )
        while child.poll() is None and not (tmp_path / "out.partial").exists():
            time.sleep(0.002)
        time.sleep(delay - 0.3)
        child.send_signal(number)
        _, text = child.communicate()
        if child.returncode == code:
            assert "same command" in text and "Traceback" not in text and not out.exists()
            seen += 1
            break
        subprocess.run(["rm", "-rf", str(out)], check=True)
    assert seen, "the merge was always faster than the signal"
    assert run([path, out, "-q"]).returncode == 0
    assert run([path, tmp_path / "whole", "-q"]).returncode == 0
    assert checksums(out) == checksums(tmp_path / "whole")


def test_S48_a_budget_below_the_floor_is_refused(tmp_path):
    done = run([recipe(tmp_path), tmp_path / "out", "--memory", "100MB"])
    assert done.returncode == 2 and "--memory" in done.stderr and not (tmp_path / "out").exists()


def test_S48_peak_memory_stays_within_the_budget(tmp_path):
    path = recipe(tmp_path)
    assert run([path, tmp_path / "out", "--memory", "250MB", "-q"]).returncode == 0
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["peak_rss_bytes"] <= 250e6


@pytest.mark.parametrize("method", ["ties", "dare_ties", "breadcrumbs", "slerp"])
def test_S49_same_bytes_whatever_the_schedule(tmp_path, method):
    path = recipe(tmp_path, method, **({"t": 0.4} if method == "slerp" else {}))
    if method == "slerp":
        entry = yaml.safe_load(open(path))
        entry["models"] = [{"model": entry["models"][0]["model"]}]
        open(path, "w").write(yaml.safe_dump(entry))
    results = []
    for i, (seed, threads, memory, shard) in enumerate(
        [(0, 1, "250MB", "5GB"), (1, 2, "250MB", "5GB"), (2, 3, "1GB", "5GB"), (3, 2, "190MB", "2KB")]
    ):
        out = tmp_path / f"out{i}"
        done = run(
            [path, out, "--threads", threads, "--memory", memory, "--shard-size", shard, "-q"],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
        )
        assert done.returncode == 0, done.stderr
        results.append(read_model(out))
    assert all(t.dtype == torch.bfloat16 for t in results[0].values())
    assert all(same(results[0], other) for other in results[1:])
