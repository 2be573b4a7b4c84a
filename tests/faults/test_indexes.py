"""Rows S14-S18: folders whose files do not say the same."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from pymerge.checkpoint import open_checkpoint
from pymerge.errors import AmbiguousModel, CorruptFile, InconsistentIndex, InputError, UnsafeFile, UnsafePath
from tests.checkpoint.raw import write_index, write_sharded, write_tensors

opened: list[str] = []


def record_open(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        opened.append(os.fsdecode(args[0]))


@pytest.fixture(scope="module", autouse=True)
def audit() -> None:
    sys.addaudithook(record_open)  # there is no way to remove one; it only appends to a list


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shards = {f"model-0000{i}-of-00003.safetensors": {f"t{i}": bytes([i]) * 10} for i in (1, 2, 3)}
    return write_sharded(tmp_path / "model", shards)


OUTSIDE = ["../x.safetensors", "/etc/x.safetensors", "C:\\x.safetensors", "..\\x.safetensors", "a/../../x.safetensors"]
ODD = ["", ".", "..", "a//b.safetensors", "./x.safetensors", "x\0.safetensors", "x\n.safetensors", "file:x.safetensors"]


@pytest.mark.parametrize("bad", OUTSIDE + ODD)
def test_S14_index_points_outside(tmp_path: Path, bad: str) -> None:
    folder = tmp_path / "model"
    write_tensors(tmp_path / "x.safetensors", {"a": b"secret"})
    write_index(folder, {"a": bad})
    opened.clear()
    with pytest.raises(UnsafePath) as caught:
        open_checkpoint(folder)
    assert "index.json" in str(caught.value) and str(caught.value).isprintable()
    assert [o for o in opened if o.startswith(str(tmp_path))] == [str(folder / "model.safetensors.index.json")]


def test_S14_links_into_a_cache_are_normal(tmp_path: Path, model: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(model.iterdir())):
        blob = tmp_path / "blobs" / f"{i:040x}"
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    assert open_checkpoint(snapshot).file_order() == ["t1", "t2", "t3"]


def test_S15_missing_shards_are_all_listed(model: Path) -> None:
    (model / "model-00002-of-00003.safetensors").unlink()
    (model / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match="2 of 3 shards are missing: model-00002-of-00003.safetensors, model-00003"):
        open_checkpoint(model)


def test_S16_index_and_shards_disagree(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    one, two = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    table["weight_map"] |= {"t1": two, "ghost": one}
    index.write_text(json.dumps(table))
    with pytest.raises(InconsistentIndex) as caught:
        open_checkpoint(model)
    message = str(caught.value)
    assert f"absent (2): t1 (promised in {two}), ghost (promised in {one})" in message
    assert f"not in the index (1): t1 (in {one})" in message


def test_S16_the_same_tensor_in_two_shards(model: Path) -> None:
    write_tensors(model / "model-00003-of-00003.safetensors", {"t3": b"new", "t1": b"twice"})
    with pytest.raises(InconsistentIndex, match=r"not in the index \(1\): t1 \(in model-00003"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "x", "a": "y"}}']
)
def test_S16_damaged_index(model: Path, text: str) -> None:
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptFile, match="index.json"):
        open_checkpoint(model)


def test_S17_single_file_and_stale_index(model: Path) -> None:
    write_tensors(model / "model.safetensors", {"only": b"x"})
    with pytest.raises(AmbiguousModel) as caught:
        open_checkpoint(model)
    assert "model.safetensors and model.safetensors.index.json" in str(caught.value)
    assert open_checkpoint(model, prefer="single").file_order() == ["only"]
    assert open_checkpoint(model, prefer="sharded").file_order() == ["t1", "t2", "t3"]


def test_S17_loose_files_without_an_index(model: Path) -> None:
    (model / "model.safetensors.index.json").unlink()
    with pytest.raises(AmbiguousModel, match="several .safetensors files without an index"):
        open_checkpoint(model)


def test_S18_safetensors_index_of_pickles(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"never read")
    write_index(tmp_path, {"a": "x.bin"})
    for allow_pickle in (False, True):
        with pytest.raises(UnsafeFile, match="another kind of file: x.bin"):
            open_checkpoint(tmp_path, allow_pickle=allow_pickle)


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="downloads nothing"):
        open_checkpoint("meta-llama/Llama-2-7b-hf")
    with pytest.raises(InputError, match="no such file or folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(InputError, match="no weights here"):
        open_checkpoint(tmp_path)
    (tmp_path / "w.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="not a model that pymerge reads"):
        open_checkpoint(tmp_path / "w.gguf")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="peft_type None"):
        open_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="not a regular file"):
        open_checkpoint(tmp_path)
