"""Where every output tensor will lie, decided before the first one is computed.

Names, shapes and dtypes of the output are known from the headers of the inputs, so the header of each shard can be
written first and each tensor then goes straight to its own place, in any order.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pymerge.checkpoint.header import ITEMSIZE, MAX_HEADER, safe_name
from pymerge.errors import OutputError, UnsupportedDtype

ALIGNMENT = 4096  # data sections start here, so that direct I/O finds aligned blocks
Entry = tuple[str, str, Sequence[int]]  # name, safetensors dtype, shape


@dataclass(frozen=True)
class Slot:
    """A tensor's place: shard number, first byte in that file, bytes."""

    shard: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One output file. `header` is everything before the data, length bytes and padding included.

    file   its path below the output's folder
    names  of its tensors as they are in the file: without the component's
    index  path of the index that lists it; "" where it is alone
    """

    file: str
    header: bytes
    size: int
    names: tuple[str, ...]
    index: str = ""


@dataclass(frozen=True)
class Layout:
    """All output files and the place of each tensor; `slots` keeps the order of the entries."""

    shards: tuple[Shard, ...]
    slots: Mapping[str, Slot]

    @property
    def total_size(self) -> int:
        """Bytes of all tensors."""
        return sum(slot.nbytes for slot in self.slots.values())

    @property
    def disk_size(self) -> int:
        """Bytes of all shard files, headers included."""
        return sum(shard.size for shard in self.shards)

    def digest(self) -> str:
        """Equal for equal files: their names and headers."""
        digest = hashlib.blake2b(digest_size=16)
        for shard in self.shards:
            digest.update(shard.file.encode() + shard.header)
        return digest.hexdigest()

    def indexes(self) -> dict[str, dict[str, Any]]:
        """Path -> what model.safetensors.index.json of several shards must say; none for a shard that is alone."""
        found: dict[str, dict[str, Any]] = {}
        for name, slot in self.slots.items():
            shard = self.shards[slot.shard]
            if not shard.index:
                continue
            table = found.setdefault(shard.index, {"metadata": {"total_size": 0}, "weight_map": {}})
            folder, slash, file = shard.file.rpartition("/")
            table["metadata"]["total_size"] += slot.nbytes
            table["weight_map"][name.removeprefix(folder + slash)] = file
        return found


def component_of(name: str, components: Iterable[str]) -> str:
    """The component that a tensor is of: the longest folder in front of its name."""
    return max((c for c in components if c and name.startswith(f"{c}/")), key=len, default="")


def plan_layout(
    entries: Sequence[Entry],
    shard_bytes: int,
    metadata: Mapping[str, str] | None = None,
    components: Mapping[str, str] | None = None,
) -> Layout:
    """Cut tensors into shards of at most `shard_bytes` of data (a larger tensor gets a shard of its own), order kept.

    entries   (name, dtype, shape) in the order in which they will lie in the files. Only where that order would leave a
              tensor at an address that is no multiple of its item size (which PyTorch cannot map), the shard is sorted
              by item size, stably.
    metadata  the headers' __metadata__; {"format": "pt"} if not given, which transformers asks for
    components  folder -> stem of its files' names: tensors FOLDER/NAME are NAME in files of that folder; "" is the
              output's own. Default: all in model.safetensors
    Raises    UnsupportedDtype; OutputError where a shard's header would be longer than any reader accepts."""
    if shard_bytes < 1:
        raise OutputError(f"shard size: expected at least 1 byte, found {shard_bytes}")
    sizes = {name: _nbytes(name, dtype, shape) for name, dtype, shape in entries}
    if len(sizes) != len(entries) or "__metadata__" in sizes:
        raise ValueError("tensor names must differ from each other and from __metadata__")
    components = components or {"": "model"}
    parts: dict[str, list[Entry]] = {component: [] for component in components}
    for entry in entries:
        parts[component_of(entry[0], components)].append(entry)
    shards: list[Shard] = []
    places: dict[str, Slot] = {}
    for component, stem in components.items():
        prefix = f"{component}/" if component else ""
        groups = _groups(parts[component], sizes, shard_bytes)
        for number, group in enumerate(groups):
            file, index = f"{prefix}{stem}.safetensors", ""
            if len(groups) > 1:
                index = f"{file}.index.json"
                file = f"{prefix}{stem}-{number + 1:05d}-of-{len(groups):05d}.safetensors"
            offsets, end = _place(group, sizes)
            header = _header(file, group, offsets, sizes, metadata, prefix)
            places |= {name: Slot(len(shards), len(header) + offsets[name], sizes[name]) for name in offsets}
            names = tuple(name.removeprefix(prefix) for name in offsets)
            shards.append(Shard(file, header, len(header) + end, names, index))
    return Layout(tuple(shards), {name: places[name] for name in sizes})


def _groups(entries: Sequence[Entry], sizes: Mapping[str, int], shard_bytes: int) -> list[list[Entry]]:
    """Runs of entries that go into one file each."""
    groups: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if groups[-1] and filled + sizes[entry[0]] > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += sizes[entry[0]]
    return groups


def _nbytes(name: str, dtype: str, shape: Sequence[int]) -> int:
    if dtype not in ITEMSIZE:
        raise UnsupportedDtype(f"{safe_name(name)}: dtype {dtype} cannot be written. Supported: {', '.join(ITEMSIZE)}")
    return math.prod(shape) * ITEMSIZE[dtype]


def _place(group: list[Entry], sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Offset of each tensor within the data section, in file order, and the end of the data."""
    offsets, end = {}, 0
    misaligned = False
    for name, dtype, _ in group:
        misaligned |= end % ITEMSIZE[dtype] != 0
        offsets[name] = end
        end += sizes[name]
    if misaligned:
        return _place(sorted(group, key=lambda entry: -ITEMSIZE[entry[1]]), sizes)
    return offsets, end


def _header(
    file: str,
    group: list[Entry],
    offsets: Mapping[str, int],
    sizes: Mapping[str, int],
    metadata: Mapping[str, str] | None,
    prefix: str,
) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(metadata) if metadata is not None else {"format": "pt"}}
    described = {name: (dtype, shape) for name, dtype, shape in group}
    for name, begin in offsets.items():
        dtype, shape = described[name]
        place = [begin, begin + sizes[name]]
        table[name.removeprefix(prefix)] = {"dtype": dtype, "shape": list(shape), "data_offsets": place}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    length = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    if length > MAX_HEADER:
        raise OutputError(
            f"{file}: the header of {len(group)} tensors takes {length} bytes, readers accept {MAX_HEADER}. Use "
            "smaller shards"
        )
    return struct.pack("<Q", length) + text.ljust(length)
