"""Rows S40 and S42-S45 for the writer: full disks, outputs in the way, two processes, torn journals, permissions."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pymerge import _C
from pymerge.checkpoint import StagedOutput, check_output_path, open_checkpoint, plan_layout
from pymerge.checkpoint.journal import JOURNAL, read_journal
from pymerge.errors import OutputError
from tests.checkpoint.raw import write_sharded, write_tensors

ENTRIES = [("a", "U8", (5000,)), ("b", "U8", (3000,)), ("c", "U8", (7,))]
VALUES = {"a": b"a" * 5000, "b": b"b" * 3000, "c": b"c" * 7}


def write_all(output: StagedOutput, names: str = "abc") -> None:
    for name in names:
        output.write(name, 0, memoryview(VALUES[name]), _C.crc32c(VALUES[name]))


def make_model(out: Path, **options: bool) -> Path:
    with StagedOutput(out, plan_layout(ENTRIES, 6000), {"recipe": "r"}, **options) as output:
        write_all(output)
        output.commit(lambda folder: None)
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


DISK_FULL = """
import json, os, sys
from pathlib import Path
from pymerge.checkpoint import StagedOutput, plan_layout, staging
from pymerge.errors import OutputError
disk, case = Path(sys.argv[1]), sys.argv[2]
if case == "unpredicted":
    staging.require_space = lambda folder, needed, what: None
size = 2_000_000 if case == "side files" else 20_000_000
try:
    with StagedOutput(disk / "out", plan_layout([("w", "U8", (size,))], 10**9), {}, overwrite=True) as output:
        output.write("w", 0, memoryview(bytearray(size)), 0)
        output.commit(lambda folder: (folder / "tokenizer.json").write_bytes(bytes(20_000_000)) and None)
except OutputError as e:
    print(json.dumps({"code": e.exit_code, "message": str(e), "left": sorted(os.listdir(disk)), "old": os.listdir(disk /
    "out")}))
"""


@pytest.mark.parametrize(
    ("case", "said"),
    [("predicted", "8388608 bytes free"), ("unpredicted", "disk is full"), ("side files", "disk is full")],
)
def test_S40_disk_full(tmp_path: Path, case: str, said: str) -> None:
    script = f"""set -e
mount -t tmpfs -o size=8m tmpfs {tmp_path}
mkdir {tmp_path}/out; touch {tmp_path}/out/config.json
exec {sys.executable} -c "$1" {tmp_path} "$2" """
    probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"this platform allows no user and mount namespace: {probe.stderr.strip()}")
    command = ["unshare", "-rm", "sh", "-c", script, "sh", DISK_FULL, case]
    child = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert found["code"] == 5 and found["left"] == ["out"] and found["old"] == ["config.json"]
    assert said in found["message"] or (case == "predicted" and "free" in found["message"])


def test_S40_file_too_large_for_the_limit(tmp_path: Path) -> None:
    old = make_model(tmp_path / "out")
    before, limits = files(old), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="output takes 5004096 bytes") as caught:
            StagedOutput(old, plan_layout([("w", "U8", (5_000_000,))], 10**9), {}, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.exit_code == 5
    assert files(old) == before and os.listdir(tmp_path) == ["out"]


def test_S42_existing_model_is_refused_and_replaced_only_when_complete(tmp_path: Path) -> None:
    out = make_model(tmp_path / "out")
    before = files(out)
    with pytest.raises(OutputError, match="holds a model already.*--overwrite"):
        make_model(out)
    (out / "marker.txt").write_text("old")
    output = StagedOutput(out, plan_layout(ENTRIES, 6000), {}, overwrite=True)
    write_all(output, "ab")
    assert (out / "marker.txt").exists()
    with pytest.raises(ValueError, match="1 tensors lack bytes: c"):
        output.commit(lambda folder: None)
    write_all(output, "c")
    output.commit(lambda folder: None)
    assert files(out) == before and os.listdir(tmp_path) == ["out"]


def test_S42_replacing_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make_model(tmp_path / "out")
    before = files(out)
    (out / "marker.txt").write_text("old")
    monkeypatch.setattr(_C, "rename_exchange", lambda a, b: False)
    make_model(out, overwrite=True)
    assert files(out) == before and os.listdir(tmp_path) == ["out"]


def test_S42_what_is_no_model_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("...")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            make_model(out, overwrite=overwrite)
    (out / "thesis.tex").unlink()
    make_model(out)  # an empty folder is no obstacle
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="not a folder"):
        make_model(tmp_path / "file")
    (tmp_path / "next.partial").mkdir()
    (tmp_path / "next.partial" / "thesis.tex").write_text("...")
    with pytest.raises(OutputError, match="holds files that are not of a merge: thesis.tex"):
        make_model(tmp_path / "next")
    assert (tmp_path / "next.partial" / "thesis.tex").exists()


def test_S42_second_process_is_refused_at_once(tmp_path: Path) -> None:
    script = """
import sys
from pymerge.checkpoint import StagedOutput, plan_layout
output = StagedOutput(sys.argv[1], plan_layout([("a", "U8", (5000,))], 6000), {})
print("locked", flush=True)
sys.stdin.readline()
"""
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", script, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "locked\n"
    with pytest.raises(OutputError, match=f"process {child.pid} on .* is writing there now"):
        make_model(out)
    child.communicate("\n", timeout=60)
    with pytest.raises(OutputError, match="not this one"):  # the lock went with the process, its unfinished work stays
        make_model(out)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_sharded(
        tmp_path / "models" / "base", {"model-1.safetensors": {"a": b"1"}, "model-2.safetensors": {"b": b"2"}}
    )


def test_S43_output_is_contains_or_lies_inside_an_input(tmp_path: Path, model: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "parent").symlink_to(model.parent)
    checkpoint = open_checkpoint(model)
    before = files(model)
    for out in (
        model, model / "merged", model / "deep" / "er", model.parent, tmp_path, tmp_path / "link", tmp_path / "link" /
        "x", tmp_path / "parent", model / ".." / "base", tmp_path / "parent" / "base" / "x",
    ):  # fmt: skip
        for inputs in ([checkpoint], [model], [tmp_path / "link"]):
            with pytest.raises(OutputError, match="inputs are never changed"):
                check_output_path(out, inputs, overwrite=True)
    assert files(model) == before
    assert check_output_path(model.parent / "merged", [checkpoint]) == model.parent / "merged"


def test_S43_output_contains_what_an_input_links_to(tmp_path: Path, model: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    shard = model / "model-1.safetensors"
    shutil.move(shard, blobs / "0123")
    shard.symlink_to(blobs / "0123")
    with pytest.raises(OutputError, match="contains the input"):
        check_output_path(blobs, [open_checkpoint(model)], overwrite=True)


def test_S43_staging_folder_is_an_input(tmp_path: Path) -> None:
    write_tensors(tmp_path / "out.partial" / "model.safetensors", {"a": b"1"})
    with pytest.raises(OutputError, match="inputs are never changed"):
        check_output_path(tmp_path / "out", [tmp_path / "out.partial"])


def interrupted(out: Path, names: str) -> Path:
    output = StagedOutput(out, plan_layout(ENTRIES, 6000), {"recipe": "r"})
    for name in names:
        write_all(output, name)
        output.flush()
    output.abort(keep=True)
    return output.staging


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_S44_torn_last_line_costs_only_its_own_work(tmp_path: Path, cut: int) -> None:
    out = tmp_path / "out"
    journal = interrupted(out, "ab") / JOURNAL
    os.truncate(journal, journal.stat().st_size - cut)
    output = StagedOutput(out, plan_layout(ENTRIES, 6000), {"recipe": "r"})
    assert output.done == {"a": [(0, 5000, _C.crc32c(VALUES["a"]))]}
    write_all(output, "bc")
    output.flush()
    assert [s.name for s in read_journal(journal)[1]] == ["a", "b", "c"]
    output.commit(lambda folder: None)
    assert files(out) == files(make_model(tmp_path / "other"))


def test_S44_nothing_is_believed_that_does_not_read_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    staging = interrupted(out, "abc")
    plan = plan_layout(ENTRIES, 6000)
    with open(staging / plan.shards[0].file, "r+b") as f:
        f.seek(plan.slots["a"].offset + 4000)
        f.write(b"?")
    (staging / plan.shards[1].file).unlink()
    with StagedOutput(out, plan, {"recipe": "r"}) as output:
        assert output.done == {}
        write_all(output)
        output.commit(lambda folder: None)
    assert files(out) == files(make_model(tmp_path / "other"))


def test_S44_bytes_written_again_in_other_pieces(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(out, "a")
    output = StagedOutput(out, plan_layout(ENTRIES, 6000), {"recipe": "r"})
    output.forget("a")
    assert output.done == {}
    for start, stop in ((0, 2000), (2000, 5000)):
        piece = VALUES["a"][start:stop]
        output.write("a", start, memoryview(piece), _C.crc32c(piece))
    output.abort(keep=True)
    with StagedOutput(out, plan_layout(ENTRIES, 6000), {"recipe": "r"}) as output:
        assert [(start, count) for start, count, _ in output.done["a"]] == [(0, 2000), (2000, 3000)]
        write_all(output, "bc")
        output.commit(lambda folder: None)
    assert files(out) == files(make_model(tmp_path / "other"))


def test_S44_damaged_first_line_starts_anew(tmp_path: Path) -> None:
    journal = interrupted(tmp_path / "out", "ab") / JOURNAL
    journal.write_bytes(b"x" + journal.read_bytes()[1:])
    assert StagedOutput(tmp_path / "out", plan_layout(ENTRIES, 6000), {"recipe": "r"}).done == {}


def test_S44_another_merge_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    staging = interrupted(out, "a")
    with pytest.raises(OutputError, match='recipe: was "r", is now "s"'):
        StagedOutput(out, plan_layout(ENTRIES, 6000), {"recipe": "s"})
    with pytest.raises(OutputError, match="layout: was"):
        StagedOutput(out, plan_layout(ENTRIES, 9000), {"recipe": "r"})
    assert read_journal(staging / JOURNAL)[1][0].name == "a"  # nothing was lost by asking
    assert StagedOutput(out, plan_layout(ENTRIES, 9000), {"recipe": "s"}, resume=False).done == {}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_S45_permissions_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        out = make_model(tmp_path / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.iterdir()} == {mode}
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask
