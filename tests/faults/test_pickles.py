"""Rows S19-S21: files that could run code."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from pymerge.checkpoint import copy_side_files, open_checkpoint
from pymerge.errors import CorruptFile, InputError, UnsafeFile
from tests.checkpoint.raw import write_tensors


class Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


def test_S19_code_in_a_pickle_never_runs(tmp_path: Path, path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"w": torch.ones(2), "x": Runs(marker)}, path)
    for allow_pickle in (False, True):
        with pytest.raises(UnsafeFile) as caught:
            open_checkpoint(tmp_path, allow_pickle=allow_pickle)
        assert "weights_only" not in str(caught.value) and str(path) in str(caught.value)
        assert not marker.exists()
    assert "system" in str(caught.value)
    torch.load(path, weights_only=False)
    assert marker.exists()  # the file does what the test believes it does


def test_S19_tensors_of_an_allowed_pickle_are_read_from_the_file(tmp_path: Path, path: Path) -> None:
    whole = torch.randn(6, 5)
    state = {"w": whole.to(torch.bfloat16), "row": whole[2], "n": torch.tensor(7), "none": torch.zeros(0, 3)}
    torch.save(state, path)
    checkpoint = open_checkpoint(tmp_path, allow_pickle=True)
    assert set(checkpoint) == set(state)
    for name, tensor in state.items():
        assert torch.equal(checkpoint[name].load(), tensor) and checkpoint[name].file == path
    with pytest.raises(UnsafeFile, match="--allow-pickle"):
        open_checkpoint(tmp_path)


def test_S19_sharded_pickles(tmp_path: Path) -> None:
    shards = {"pytorch_model-1.bin": {"a": torch.ones(2)}, "pytorch_model-2.bin": {"b": torch.zeros(3)}}
    for file, state in shards.items():
        torch.save(state, tmp_path / file)
    weight_map = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert open_checkpoint(tmp_path, allow_pickle=True)["b"].load().tolist() == [0, 0, 0]
    with pytest.raises(UnsafeFile):
        open_checkpoint(tmp_path)


def test_S19_what_is_no_state_dict(tmp_path: Path, path: Path) -> None:
    torch.save({"w": torch.ones(2, 3).t()}, path)
    with pytest.raises(InputError, match="strided"):
        open_checkpoint(tmp_path, allow_pickle=True)
    torch.save({"w": torch.ones(2), "epoch": 3}, path)
    with pytest.raises(InputError, match="these entries are not: epoch"):
        open_checkpoint(tmp_path, allow_pickle=True)
    torch.save([torch.ones(2)], path)
    with pytest.raises(InputError, match="found list"):
        open_checkpoint(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_S20_damaged_pickles(tmp_path: Path, path: Path, keep: float) -> None:
    torch.save({"w": torch.arange(1000.0)}, path)
    os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(CorruptFile, match="not a whole zip archive"):
        open_checkpoint(tmp_path, allow_pickle=True)


def test_S20_not_a_zip_at_all(tmp_path: Path, path: Path) -> None:
    path.write_bytes(b"\x80\x02}q\x00." * 50)
    with pytest.raises(CorruptFile):
        open_checkpoint(tmp_path, allow_pickle=True)


def test_S21_remote_code_is_neither_run_nor_copied_and_is_noted(tmp_path: Path) -> None:
    base, out, marker = tmp_path / "base", tmp_path / "out", tmp_path / "marker"
    write_tensors(base / "model.safetensors", {"w": b"abcd"})
    (base / "modeling_x.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (base / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoModel": "modeling_x.M\x1b"}}))
    out.mkdir()
    report = copy_side_files(open_checkpoint(base), out, out_dtype="BF16")
    assert not marker.exists() and sorted(os.listdir(out)) == ["config.json"]
    notes = "\n".join(report["notes"])
    assert (
        "neither run nor copied: modeling_x.py" in notes
        and "AutoModel -> modeling_x.M" in notes
        and "\x1b" not in notes
    )
