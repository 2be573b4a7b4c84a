"""Weight files written byte by byte, right or wrong, without the library that would refuse to."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_raw(path: Path, header: bytes | Mapping[str, Any], data: bytes = b"", *, length: int | None = None) -> Path:
    """8 length bytes (`length` if they shall lie), header, data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_tensors(path: Path, tensors: Mapping[str, bytes]) -> Path:
    """A right file of one-dimensional U8 tensors."""
    header, at = {}, 0
    for name, data in tensors.items():
        header[name] = entry("U8", [len(data)], at, at + len(data))
        at += len(data)
    return write_raw(path, header, b"".join(tensors.values()))


def write_sharded(folder: Path, shards: Mapping[str, Mapping[str, bytes]]) -> Path:
    """A right folder: shards by file name, and the index."""
    for file, tensors in shards.items():
        write_tensors(folder / file, tensors)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path
