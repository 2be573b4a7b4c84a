"""Rows S01-S13: damaged, hostile and odd safetensors files."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pymerge.checkpoint import open_checkpoint
from pymerge.checkpoint.header import MAX_HEADER, safe_name
from pymerge.errors import ChangedInput, CorruptFile, UnsupportedDtype
from tests.checkpoint.raw import entry, write_raw, write_tensors


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def corrupt(path: Path) -> str:
    with pytest.raises(CorruptFile) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_S01_shorter_than_a_length(path: Path, size: int) -> None:
    path.write_bytes(b"\1" * size)
    assert f"{size} bytes" in corrupt(path)


def test_S02_header_longer_than_the_file(path: Path) -> None:
    write_raw(path, {"a": entry("U8", [1], 0, 1)}, b"x", length=1000)
    message = corrupt(path)
    assert "1000 bytes" in message and f"{path.stat().st_size} bytes" in message


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1])
def test_S03_absurd_header_length(path: Path, length: int) -> None:
    path.write_bytes(struct.pack("<Q", length))
    os.truncate(path, 8 + 2**31)  # a sparse file: the lengths that fit into it must be refused too
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert str(length) in corrupt(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize("filler", [b"[],", b"{},", b'[{"":0}],'])
def test_S03_header_of_brackets_costs_no_gigabytes(path: Path, filler: bytes) -> None:
    write_raw(path, b'{"a":[' + filler * (40_000_000 // len(filler)) + b"0]}")
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert "no model needs that" in corrupt(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000
    assert time.process_time() - started < 2


def test_S04_git_lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4711\n")
    assert "run git lfs pull" in corrupt(path)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"\xff\xfe{}", "not UTF-8 at byte 8"),
        (b'{"\xc3\xa9":\xff}', "not UTF-8 at byte 14"),
        (b"{a:", "not JSON at byte 9"),
        ('{"ä":x}'.encode(), "not JSON at byte 14"),
        (b"[]", "a JSON array at byte 8"),
        (b" {}", "object"),
        (b"", "not JSON at byte 8"),
        (b"3", "object"),
        (b'{"a":' * 30_000, "nested too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", "number out of range"),
        (b'{"a":3}', "expected an object with dtype"),
        (b'{"a":{"dtype":"U8","shape":[1]}}', "expected an object with dtype"),
        (b'{"a":{"dtype":"U8","shape":1,"data_offsets":[0,1]}}', "must be a list"),
        (b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}', "no sizes"),
        (b'{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', "no sizes"),
        (b'{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', "no sizes"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}}', "ascending"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-1,0]}}', "ascending"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}}', "two integers"),
        (b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,1]}}', "takes 2 bytes"),
        (b'{"__metadata__":{"a":1}}', "text to text"),
        (b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "not valid Unicode"),
    ],
)
def test_S05_header_is_not_the_json_it_must_be(path: Path, header: bytes, said: str) -> None:
    write_raw(path, header, b"x")
    assert said in corrupt(path)


def test_S06_truncated_data_names_the_cut_tensors(path: Path) -> None:
    write_tensors(path, {"first": bytes(50), "second": bytes(60), "third": bytes(70)})
    size = path.stat().st_size
    os.truncate(path, size - 100)
    message = corrupt(path)
    assert f"expected {size} bytes, found {size - 100}" in message
    assert "second, third" in message and "first" not in message


def test_S06_bytes_that_no_tensor_owns(path: Path) -> None:
    write_raw(path, {"a": entry("U8", [4], 0, 4)}, bytes(9))
    assert "5 bytes after the last tensor" in corrupt(path)
    write_raw(path, {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 6, 10)}, bytes(10))
    assert "2 data bytes before tensor b" in corrupt(path)


@pytest.mark.parametrize("second", [[8, 24], [0, 16], [4, 4]])
def test_S07_overlap_names_both(path: Path, second: list[int]) -> None:
    rows = second[1] - second[0]
    write_raw(path, {"left": entry("U8", [16], 0, 16), "right": entry("U8", [rows], *second)}, bytes(24))
    message = corrupt(path)
    assert "left" in message and "right" in message and "overlap" in message


def test_S08_duplicate_key(path: Path) -> None:
    one = json.dumps(entry("F32", [4], 0, 16))
    two = json.dumps(entry("I32", [4], 0, 16))
    write_raw(path, f'{{"a":{one},"a":{two}}}'.encode(), bytes(16))
    assert "duplicate key a" in corrupt(path)
    write_raw(path, b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"dtype":"I8"}}', b"x")
    assert "duplicate key dtype" in corrupt(path)


@pytest.mark.parametrize("shape", [[2**33, 2**33], [2**63], [2**62, 2, 0], [10**4000]])
def test_S09_size_overflows(path: Path, shape: list[int]) -> None:
    write_raw(path, {"a": entry("F32", shape, 0, 16)}, bytes(16))
    assert "overflows 64 bits" in corrupt(path)


@pytest.mark.parametrize("dtype", ["F99", "F4", "F6_E2M3", "f32", 3, None, "\x1b[31m"])
def test_S10_unsupported_dtype(path: Path, dtype: str) -> None:
    write_raw(path, {"good": entry("U8", [2], 0, 2), "w": entry(dtype, [4], 2, 4)}, bytes(4))
    with pytest.raises(UnsupportedDtype) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert f"w ({dtype!r})" in message and "good" not in message and "BF16" in message
    assert message.isprintable()


@pytest.mark.parametrize("name", ["a\n\x1b[31m", "", "x" * 65536, "\0", "‮abc", " a ", "ä/日本"])
def test_S11_odd_names_are_read_and_shown_safely(path: Path, name: str) -> None:
    write_tensors(path, {name: b"abc", "plain": b"de"})
    checkpoint = open_checkpoint(path)
    view = memoryview(bytearray(3))
    checkpoint[name].read_into(view)
    assert bytes(view) == b"abc"
    assert repr(checkpoint[name]).isprintable() and len(repr(checkpoint[name])) < 300
    os.truncate(path, path.stat().st_size - 4)
    message = corrupt(path)
    assert message.isprintable() and len(message) < 1000


def test_S11_safe_names_keep_plain_names_as_they_are() -> None:
    for name in ("model.layers.3.mlp.up_proj.weight", "ä.weight", "a b"):
        assert safe_name(name) == name
    assert safe_name("a\nb") == "'a\\nb'" and safe_name("") == "''"


def test_S12_zero_dimensional_single_and_empty_tensors(path: Path) -> None:
    header = {"s": entry("F32", [], 0, 4), "one": entry("F32", [1], 4, 8), "none": entry("F32", [0, 4], 8, 8)}
    write_raw(path, header, struct.pack("<2f", 1.5, -2.5))
    checkpoint = open_checkpoint(path)
    assert {name: t.shape for name, t in checkpoint.items()} == {"s": (), "one": (1,), "none": (0, 4)}
    assert checkpoint["s"].load().item() == 1.5
    assert checkpoint["one"].load().tolist() == [-2.5]
    assert tuple(checkpoint["none"].load().shape) == (0, 4)


READER = """
import sys
from pymerge.checkpoint import open_checkpoint
from pymerge.errors import ChangedInput
tensor = open_checkpoint(sys.argv[1])["a"]
print("open", flush=True)
sys.stdin.readline()
try:
    tensor.read_into(memoryview(bytearray(tensor.nbytes)))
except ChangedInput as e:
    print(e)
    sys.exit(e.exit_code)
"""


def test_S13_file_shrinks_while_it_is_read(path: Path) -> None:
    write_tensors(path, {"a": bytes(1 << 20)})
    child = subprocess.Popen(
        [sys.executable, "-c", READER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "open\n"
    os.truncate(path, 1000)
    out, _ = child.communicate("\n", timeout=60)
    assert child.returncode == 3, out
    assert str(path) in out and "ended at byte 1000" in out


def test_S13_changed_size_or_time_is_noticed(path: Path) -> None:
    write_tensors(path, {"a": bytes(100)})
    with open_checkpoint(path) as checkpoint:
        checkpoint.check_unchanged()
        stamp = path.stat().st_mtime_ns
        os.utime(path, ns=(stamp, stamp + 1))
        with pytest.raises(ChangedInput, match="changed while it was in use"):
            checkpoint.check_unchanged()
        path.unlink()
        with pytest.raises(ChangedInput, match="gone"):
            checkpoint.check_unchanged()
