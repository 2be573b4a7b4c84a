"""Opening and reading, compared with what the safetensors library reads."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

from pymerge.checkpoint import open_checkpoint
from pymerge.errors import CorruptFile, InputError, UnsupportedDtype
from tests.checkpoint.raw import entry, write_raw, write_sharded, write_tensors


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        f"t.{d}": torch.randn(5, 7, generator=generator).to(d) for d in (torch.float32, torch.bfloat16, torch.float16)
    }
    return made | {"ids": torch.arange(10), "mask": torch.tensor([True, False]), "s": torch.tensor(2.5)}


def test_file_equals_library_and_memory(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as disk, open_checkpoint(tensors) as memory:
        assert set(disk) == set(memory) == set(tensors) and "x" not in disk and disk.nbytes == memory.nbytes
        for name, tensor in tensors.items():
            ours, kept = disk[name], memory[name]
            assert (ours.dtype, ours.shape, ours.nbytes) == (kept.dtype, kept.shape, kept.nbytes)
            assert torch.equal(ours.load(), tensor) and torch.equal(kept.load(), tensor)
            for start, stop in ((0, ours.nbytes), (1, ours.nbytes), (0, 1)):
                views = [memoryview(bytearray(stop - start)) for _ in range(2)]
                ours.read_into(views[0], start)
                kept.read_into(views[1], start)
                assert views[0] == views[1] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()[start:stop]
            for tensor_like in (ours, kept):
                with pytest.raises(ValueError, match="asked for"):
                    tensor_like.read_into(memoryview(bytearray(2)), ours.nbytes - 1)
        order = disk.file_order()
        assert [disk[n].offset for n in order] == sorted(disk[n].offset for n in order)


def test_views_of_any_item_size(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    buffer = numpy.empty(35, dtype=numpy.float32)
    open_checkpoint(tmp_path)["t.torch.float32"].read_into(memoryview(buffer))
    assert torch.equal(torch.from_numpy(buffer).reshape(5, 7), tensors["t.torch.float32"])


def test_memory_tensors_of_every_kind() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    kinds = {
        "strided": base.t(),
        "row": base[2],
        "param": torch.nn.Parameter(base.clone()),
        "neg": torch.tensor([1 + 2j]).conj(),
    }
    checkpoint = open_checkpoint(kinds)
    for name, tensor in kinds.items():
        view = memoryview(bytearray(checkpoint[name].nbytes))
        checkpoint[name].read_into(view)
        assert bytes(view) == tensor.detach().resolve_conj().contiguous().numpy().tobytes()
    with pytest.raises(InputError, match="meta"):
        open_checkpoint({"a": torch.empty(2, device="meta")})
    with pytest.raises(InputError, match="found a: int"):
        open_checkpoint({"a": 3})
    with pytest.raises(UnsupportedDtype, match="complex128"):
        open_checkpoint({"a": torch.zeros(1, dtype=torch.complex128)})


def test_sharded_folder_config_and_fingerprint(tmp_path: Path) -> None:
    shards = {"model-2.safetensors": {"b": b"bb"}, "model-1.safetensors": {"z": b"z", "a": b"aaa"}}
    write_sharded(tmp_path, shards)
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.file_order() == ["z", "a", "b"] and checkpoint.config == {"model_type": "x"}
    first = checkpoint.fingerprint()
    assert json.loads(json.dumps(first)) == open_checkpoint(str(tmp_path)).fingerprint() == first
    assert [f[0] for f in first["files"]] == ["model-1.safetensors", "model-2.safetensors"]
    assert open_checkpoint(tmp_path / "model.safetensors.index.json").file_order() == ["z", "a", "b"]
    write_tensors(tmp_path / "model-2.safetensors", {"b": b"cc"})
    assert open_checkpoint(tmp_path).fingerprint() != first


def test_memory_has_a_fingerprint_of_its_own() -> None:
    state = {"a": torch.ones(2)}
    checkpoint = open_checkpoint(state)
    assert checkpoint.fingerprint() == checkpoint.fingerprint() != open_checkpoint(state).fingerprint()
    assert open_checkpoint(checkpoint) is checkpoint and checkpoint.path is None


def test_damaged_config(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", {"a": b"1"})
    (tmp_path / "config.json").write_text('{"a": 1,')
    with pytest.raises(CorruptFile, match="config.json: not JSON at byte 8"):
        open_checkpoint(tmp_path)


def test_misaligned_data_is_read_right(tmp_path: Path) -> None:
    header = {"odd": entry("U8", [3], 0, 3), "w": entry("F32", [2], 3, 11)}
    write_raw(tmp_path / "m.safetensors", header, b"abc" + numpy.array([1.5, -2], "<f4").tobytes())
    assert open_checkpoint(tmp_path / "m.safetensors")["w"].load().tolist() == [1.5, -2.0]


def test_thousands_of_tensors_open_fast(tmp_path: Path) -> None:
    names = [f"model.layers.{i // 101}.mlp.experts.{i % 101}.up_proj.weight" for i in range(4539)]
    header = {name: entry("BF16", [2, 2], 8 * i, 8 * i + 8) for i, name in enumerate(names)}
    write_raw(tmp_path / "m.safetensors", header, bytes(8 * 4539))
    costs = []
    for _ in range(3):
        started = time.process_time()
        assert len(open_checkpoint(tmp_path / "m.safetensors")) == 4539
        costs.append(time.process_time() - started)
    assert min(costs) < 0.15  # about 0.03 s on an idle machine
