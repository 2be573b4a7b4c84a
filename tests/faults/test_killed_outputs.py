"""Row S39 for the writer alone: killed before any system call, the output is absent or whole, and a rerun gives the
same bytes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.merging import layout, run, value


def start(out: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.checkpoint.merging", str(out), json.dumps(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(child: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = child.communicate(timeout=120)
    return child.returncode, out + err


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int, int]:
    """The files of an uninterrupted run, and how many calls a fresh and an overwriting run take."""
    out = tmp_path_factory.mktemp("whole") / "out"
    code, fresh = finish(start(out))
    assert code == 0, fresh
    files = content(out)
    shards = layout().shards
    assert sorted(files) == sorted(
        [s.file for s in shards] + ["1_Pooling/config.json", "config.json", "model.safetensors.index.json"]
    )
    for name, slot in layout().slots.items():
        data = files[shards[slot.shard].file]
        assert data[slot.offset : slot.offset + slot.nbytes] == value(name, slot.nbytes, 0)
    code, again = finish(start(out, overwrite=True))
    assert code == 0 and content(out) == files
    return files, int(fresh), int(again)


def check_fresh(folder: Path, kill_at: int, files: dict[str, bytes]) -> None:
    out = folder / f"out{kill_at}"
    code, said = finish(start(out, kill_at=kill_at))
    assert code == -signal.SIGKILL, said
    if out.exists():
        assert content(out) == files
        return
    code, said = finish(start(out))
    assert code == 0, (kill_at, said)
    assert content(out) == files
    assert not any(p.name.endswith((".partial", "replaced")) for p in folder.iterdir())


def check_overwrite(folder: Path, kill_at: int, files: dict[str, bytes]) -> None:
    out = folder / f"over{kill_at}"
    run(out, {"seed": 1})
    old = content(out)
    code, said = finish(start(out, kill_at=kill_at, overwrite=True))
    assert code == -signal.SIGKILL, said
    assert content(out) in (old, files)
    code, said = finish(start(out, overwrite=True))
    assert code == 0, (kill_at, said)
    assert content(out) == files
    assert not any(p.name.endswith((".partial", "replaced")) for p in folder.iterdir())


def sample(calls: int, count: int) -> list[int]:
    """Some calls at random, and the last ones: the commit."""
    chosen = random.Random(0).sample(range(1, calls + 1), count)
    return sorted({*chosen, *range(calls - 5, calls + 1)})


def test_S39_killed_before_some_calls(tmp_path: Path, whole: tuple[dict[str, bytes], int, int]) -> None:
    files, fresh, again = whole
    for kill_at in sample(fresh, 10):
        check_fresh(tmp_path, kill_at, files)
    for kill_at in sample(again, 4):
        check_overwrite(tmp_path, kill_at, files)


@pytest.mark.slow
def test_S39_killed_before_every_call(tmp_path: Path, whole: tuple[dict[str, bytes], int, int]) -> None:
    files, fresh, again = whole
    for kill_at in range(1, fresh + 1):
        check_fresh(tmp_path, kill_at, files)
    for kill_at in range(1, again + 1):
        check_overwrite(tmp_path, kill_at, files)


@pytest.mark.slow
def test_S39_killed_at_random_moments_again_and_again(tmp_path: Path, whole: tuple[dict[str, bytes], int, int]) -> None:
    out, generator = tmp_path / "out", random.Random(0)
    for _ in range(20):
        child = start(out, slow=0.05)
        time.sleep(generator.uniform(0.05, 0.5))
        child.kill()
        if finish(child)[0] == 0 or out.exists():
            break
    if not out.exists():
        assert finish(start(out))[0] == 0
    assert content(out) == whole[0]
