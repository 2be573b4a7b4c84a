"""Every way in which a merge can be stopped, for three kinds of methods: the same call afterwards gives the bytes of an
undisturbed merge, or says why it cannot. Kills and signals: test_interruption, test_killed_outputs."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import pymerge
from pymerge.engine.execute import Executor
from pymerge.errors import ChangedInput, InputError, MergeError, OutputError
from tests.models import family, read_model, same

SHAPES = {f"layers.{i}.up.weight": (96, 64 + i) for i in range(12)} | {"norm": (64,)}
METHODS = {"ties": {"density": 0.3}, "tsv_m": {}, "linear": {"weight": 0.5}}
OPTIONS = pymerge.Options(memory=200_000_000, threads=2, shard_bytes=60_000, progress=False)


class Merge:
    """One recipe; what it gives undisturbed."""

    def __init__(self, folder: Path, method: str) -> None:
        self.folder, self.method = folder, method
        self.base, self.children = family(folder, 3, SHAPES)
        self.wanted = self.run("whole")

    def run(self, name: str = "out"):
        base = None if self.method == "linear" else self.base
        out = self.folder / name
        pymerge.merge(base, self.children, method=self.method, out=out, options=OPTIONS, **METHODS[self.method])
        return read_model(out)

    def finishes(self) -> bool:
        """Whether the same call now gives what an undisturbed merge gives, and leaves nothing else."""
        equal = same(self.run(), self.wanted)
        return equal and not [p for p in self.folder.iterdir() if p.name.endswith((".partial", "replaced"))]


@pytest.fixture(params=METHODS)
def merge(request, tmp_path) -> Merge:
    return Merge(tmp_path, request.param)


def failing_after(calls: int, call: Callable, error: Callable[[], BaseException], *, when: Callable = lambda *a: True):
    """`call`, whose n-th use and all later ones raise."""
    lock, done = threading.Lock(), [0]

    def wrapped(*arguments, **options):
        if when(*arguments):
            with lock:
                done[0] += 1
                if done[0] > calls:
                    raise error()
        return call(*arguments, **options)

    return wrapped


def in_shard(fd: int, *_: object) -> bool:
    return os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors")


@pytest.mark.parametrize("calls", [0, 5, 20])
def test_a_read_error_keeps_what_is_finished(merge, calls):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            os, "preadv", failing_after(10 + calls, os.preadv, lambda: OSError(errno.EIO, "Input/output error"))
        )
        with pytest.raises(InputError, match="reading failed at byte .*Input/output error"):
            merge.run()
    assert not (merge.folder / "out").exists()
    assert merge.finishes()


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota"), (errno.EIO, "")])
@pytest.mark.parametrize("calls", [0, 4])
def test_a_disk_that_takes_no_more(merge, number, said, calls):
    with pytest.MonkeyPatch.context() as patch:
        error = failing_after(calls, os.pwrite, lambda: OSError(number, os.strerror(number)), when=in_shard)
        patch.setattr(os, "pwrite", error)
        with pytest.raises(OutputError) as raised:
            merge.run()
    assert said in str(raised.value).lower() and raised.value.exit_code == 5
    assert not (merge.folder / "out").exists()
    assert merge.finishes()


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [0, 3, 10])
def test_an_exception_in_the_middle(merge, error, calls):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Executor, "write", failing_after(calls, Executor.write, lambda: error("planted")))
        with pytest.raises(error):
            merge.run()
    assert not (merge.folder / "out").exists()
    assert merge.finishes()


def test_an_input_that_changes_is_noticed_and_nothing_is_written(merge):
    victim = merge.children[1] / "model.safetensors"

    def touched(self, segment, write=Executor.write):
        os.utime(victim, ns=(1, 1))
        return write(self, segment)

    times = os.stat(victim).st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Executor, "write", touched)
        with pytest.raises(ChangedInput, match="tuned1"):
            merge.run()
    assert not list(merge.folder.glob("out*"))
    os.utime(victim, ns=(times, times))
    assert merge.finishes()


def test_an_input_that_changes_between_two_runs_is_not_mixed_with_the_first(merge):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Executor, "write", failing_after(5, Executor.write, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge.run()
    os.utime(merge.children[0] / "model.safetensors", ns=(1, 1))
    with pytest.raises(MergeError, match=r"model.safetensors has changed \(time of change\)"):
        merge.run()


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_clocks_that_jump_change_nothing(merge, jump):
    started = time.time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: started + jump)
        assert merge.finishes()
