"""Planned files hold the right bytes, whoever reads them, in whatever pieces and order they were written."""

from __future__ import annotations

import json
import math
import mmap
import random
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pymerge import _C
from pymerge.checkpoint import ITEMSIZE, TORCH_NAME, StagedOutput, open_checkpoint, plan_layout
from pymerge.errors import OutputError, UnsupportedDtype

DTYPES = ["BOOL", "U8", "I16", "F16", "BF16", "F32", "I64", "F64"]
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda n: n != "__metadata__")
shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
entry_lists = st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes), max_size=8)


def write(out: Path, layout, values: dict[str, bytes], piece: int = 1 << 20, seed: int = 0) -> None:
    pieces = [(n, start) for n, v in values.items() for start in range(0, len(v), piece)]
    random.Random(seed).shuffle(pieces)
    with StagedOutput(out, layout, {"seed": seed}) as output:
        for name, start in pieces:
            view = memoryview(values[name])[start : start + piece]
            output.write(name, start, view, _C.crc32c(view))
        assert output.checksums() == {n: _C.crc32c(v) for n, v in values.items() if v}
        output.commit(lambda folder: None)


@given(entries=entry_lists, shard_bytes=st.integers(1, 400), piece=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_what_safetensors_and_we_read(entries: dict, shard_bytes: int, piece: int) -> None:
    generator = random.Random(0)
    listed = [(n, dtype, shape) for n, (dtype, shape) in entries.items()]
    values = {n: generator.randbytes(math.prod(s) * ITEMSIZE[d]) for n, d, s in listed}
    values = {n: bytes(b & 1 for b in v) if entries[n][0] == "BOOL" else v for n, v in values.items()}
    layout = plan_layout(listed, shard_bytes)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        write(out, layout, values, piece)
        ours = open_checkpoint(out)
        theirs = {n: t for f in out.glob("*.safetensors") for n, t in load_file(f).items()}
        assert set(ours) == set(theirs) == set(values)
        for name, dtype, shape in listed:
            view = memoryview(bytearray(len(values[name])))
            ours[name].read_into(view)
            assert bytes(view) == values[name]
            for tensor in (ours[name].load(), theirs[name]):
                assert tuple(tensor.shape) == shape and str(tensor.dtype) == f"torch.{TORCH_NAME[dtype]}"
                assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == values[name]
        ours.close()


def test_layout_keeps_order_aligns_data_and_names_shards() -> None:
    entries = [(f"t{i}", "BF16", (100,)) for i in range(7)]
    layout = plan_layout(entries, 400)
    assert [s.names for s in layout.shards] == [("t0", "t1"), ("t2", "t3"), ("t4", "t5"), ("t6",)]
    assert layout.shards[0].file == "model-00001-of-00004.safetensors"
    assert all(len(s.header) % 4096 == 0 and s.size == len(s.header) + 200 * len(s.names) for s in layout.shards)
    assert layout.slots["t3"].shard == 1 and layout.slots["t3"].offset == 4096 + 200
    (index,) = layout.indexes().values()
    assert list(layout.indexes()) == ["model.safetensors.index.json"] and index["metadata"] == {"total_size": 1400}
    assert list(index["weight_map"]) == [f"t{i}" for i in range(7)]
    assert index["weight_map"]["t6"] == "model-00004-of-00004.safetensors"
    single = plan_layout(entries, 10**9, {"format": "pt", "x": "y"})
    assert not single.indexes() and single.shards[0].file == "model.safetensors"
    assert json.loads(single.shards[0].header[8:])["__metadata__"] == {"format": "pt", "x": "y"}


def test_layout_sorts_only_where_a_tensor_would_be_misaligned() -> None:
    entries = [("odd", "U8", (3,)), ("w", "F32", (2,)), ("v", "F32", (1,)), ("h", "F16", (1,))]
    assert plan_layout(entries, 100).shards[0].names == ("w", "v", "h", "odd")
    assert list(plan_layout(entries, 100).slots) == ["odd", "w", "v", "h"]
    even = [("odd", "U8", (4,)), ("w", "F32", (2,))]
    assert plan_layout(even, 100).shards[0].names == ("odd", "w")


def test_layout_refuses_what_cannot_be_written() -> None:
    with pytest.raises(UnsupportedDtype, match="F4"):
        plan_layout([("a", "F4", (2,))], 100)
    with pytest.raises(OutputError, match="at least 1 byte"):
        plan_layout([], 0)
    for twice in ([("a", "U8", (1,)), ("a", "U8", (1,))], [("__metadata__", "U8", (1,))]):
        with pytest.raises(ValueError, match="must differ"):
            plan_layout(twice, 100)


@pytest.mark.parametrize("folder", ["disk", "/dev/shm"])
@pytest.mark.parametrize("shift", [0, 1, 2048])
def test_direct_and_buffered_writes_give_the_same_bytes(tmp_path: Path, folder: str, shift: int) -> None:
    """shift 0: aligned alike, so whole blocks go by direct I/O where the file system has it."""
    generator = random.Random(shift)
    values = {f"t{i}": generator.randbytes(n) for i, n in enumerate([1_500_001, 300, 2_000_000, 4096, 900_000])}
    layout = plan_layout([(n, "U8", (len(v),)) for n, v in values.items()], 10**9)
    pool = memoryview(mmap.mmap(-1, 3 << 20))
    with tempfile.TemporaryDirectory(dir=folder if folder.startswith("/") else tmp_path) as parent:
        out = Path(parent) / "out"
        with StagedOutput(out, layout, {}) as output:
            for name, value in values.items():
                begin = layout.slots[name].offset % 4096 + shift
                view = pool[begin : begin + len(value)]
                view[:] = value
                output.write(name, 0, view, _C.crc32c(view))
                view[:] = bytes(len(value))  # the buffer is the caller's again
            output.commit(lambda folder: None)
        assert {n: t.numpy().tobytes() for n, t in load_file(out / "model.safetensors").items()} == values


def test_many_threads_write_at_once(tmp_path: Path) -> None:
    generator = random.Random(0)
    values = {f"t{i}": generator.randbytes(generator.randrange(1, 300_000)) for i in range(40)}
    layout = plan_layout([(n, "U8", (len(v),)) for n, v in values.items()], 1_000_000)
    with StagedOutput(tmp_path / "out", layout, {}) as output:

        def work(mine: list[str]) -> None:
            for name in mine:
                output.write(name, 0, memoryview(values[name]), _C.crc32c(values[name]))
                output.flush()

        threads = [threading.Thread(target=work, args=([*values][i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        output.commit(lambda folder: None)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert {n: t.load().numpy().tobytes() for n, t in checkpoint.items()} == values


def test_journal_is_written_by_bytes_and_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = plan_layout([("a", "U8", (10,)), ("b", "U8", (10,))], 100)
    for limit in ("FLUSH_BYTES", "FLUSH_SECONDS"):
        monkeypatch.setattr(f"pymerge.checkpoint.write.{limit}", 0)
        output = StagedOutput(tmp_path / limit, layout, {})
        size = (output.staging / "journal").stat().st_size
        output.write("a", 0, memoryview(bytes(10)), _C.crc32c(bytes(10)))
        assert (output.staging / "journal").stat().st_size > size
        output.abort(keep=False)
        assert not output.staging.exists()
        monkeypatch.undo()


def test_write_outside_a_tensor_is_refused(tmp_path: Path) -> None:
    output = StagedOutput(tmp_path / "out", plan_layout([("a", "U8", (10,))], 100), {})
    for start in (-1, 6):
        with pytest.raises(ValueError, match="the tensor has 10"):
            output.write("a", start, memoryview(bytes(5)), 0)
    output.abort(keep=False)
