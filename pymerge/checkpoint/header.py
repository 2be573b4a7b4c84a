"""The header of a safetensors file, parsed with checks of its own: the file may come from anybody.

    8 bytes   n, unsigned, little endian
    n bytes   JSON object: name -> {"dtype", "shape", "data_offsets": [begin, end] in the data}; "__metadata__": text ->
    text the rest  data: the tensors, each byte belongs to exactly one of them

Everything is checked before it is used: lengths before memory is taken, duplicate keys before a dict swallows them.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pymerge.errors import CorruptFile, UnsupportedDtype

# Bytes per entry of every dtype that pymerge reads.
ITEMSIZE = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
# The same dtypes as PyTorch and config.json call them.
TORCH_NAME = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip

MAX_HEADER = 100_000_000  # the limit of the safetensors library
# Brackets and commas in one header: half a million tensors need fewer. They bound what parsing can cost (faults.md,
# promise 7).
MAX_BRACKETS = 2_000_000
MAX_COMMAS = 8_000_000
MAX_INT = 2**63 - 1
_LFS = b"version https://git-lfs"
_FIELDS = {"dtype", "shape", "data_offsets"}


class TensorEntry(NamedTuple):
    """One tensor of a file; `offset` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A checked header. `tensors` is in the order of the bytes in the file; `digest` is the hash of the header's
    bytes."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    size: int
    digest: str


class DuplicateKey(ValueError):
    """A JSON object has the same key twice."""


def safe_name(name: str, limit: int = 160) -> str:
    """A name from a file, fit for a terminal: control characters escaped, the middle of very long ones left out."""
    shown = name if len(name) <= limit else f"{name[: limit // 2]}...{name[-limit // 4 :]}"
    if not shown or not shown.isprintable() or shown != shown.strip():
        shown = repr(shown)
    return shown if len(name) <= limit else f"{shown} ({len(name)} characters)"


def name_list(names: Sequence[str], limit: int = 8) -> str:
    """The first few names for a message, and how many more there are."""
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(safe_name(n) for n in names[:limit]) + more


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` for json.loads that refuses duplicate keys."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKey(key)
            seen.add(key)
    return result


def parse_json(raw: bytes, where: str, first_byte: int = 0) -> Any:
    """JSON from a stranger: any damage becomes a CorruptFile with the byte position (`first_byte` is that of
    raw[0])."""
    if raw.count(b"[") + raw.count(b"{") > MAX_BRACKETS or raw.count(b",") > MAX_COMMAS:
        raise CorruptFile(
            f"{where}: {len(raw)} bytes of JSON with more than {MAX_BRACKETS} brackets or {MAX_COMMAS} commas; no "
            "model needs that"
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise CorruptFile(f"{where}: not UTF-8 at byte {first_byte + e.start} (0x{raw[e.start]:02x})") from None
    try:
        # "-0" is an integer to Python and a float to other JSON readers; it has no place in a header
        return json.loads(text, object_pairs_hook=unique_pairs, parse_int=_integer if b"-0" in raw else None)
    except DuplicateKey as e:
        raise CorruptFile(
            f"{where}: duplicate key {safe_name(str(e))}: the same name stands twice, so which one counts is undefined"
        ) from None
    except json.JSONDecodeError as e:
        position = first_byte + len(text[: e.pos].encode("utf-8"))
        raise CorruptFile(f"{where}: not JSON at byte {position}: {e.msg}") from None
    except RecursionError:
        raise CorruptFile(f"{where}: JSON nested too deeply") from None
    except ValueError as e:  # -0, or an integer of more than 4300 digits
        raise CorruptFile(f"{where}: JSON number out of range: {e}") from None


def _integer(text: str) -> int:
    if text == "-0":
        raise ValueError("-0")
    return int(text)


def read_header(read: Callable[[int, int], bytes], size: int, path: str | os.PathLike[str]) -> Header:
    """Read and check the header of an open safetensors file of `size` bytes. read(n, offset): up to n of them.

    Raises   CorruptFile (rows S01-S09 of the fault list), UnsupportedDtype (S10); both name the file and the
             tensors."""
    where = safe_name(os.fspath(path), 400)
    prefix = read(64, 0)
    if prefix.startswith(_LFS):
        raise CorruptFile(f"{where}: this is a git-lfs pointer, not the weights: run git lfs pull")
    if size < 8 or len(prefix) < 8:
        raise CorruptFile(f"{where}: {size} bytes; a safetensors file has at least 8. Download it again")
    (length,) = struct.unpack("<Q", prefix[:8])
    if length > MAX_HEADER:
        raise CorruptFile(
            f"{where}: the header says it is {length} bytes long; more than {MAX_HEADER} is not a safetensors file"
        )
    if 8 + length > size:
        raise CorruptFile(f"{where}: the header says it is {length} bytes long, but the file has {size} bytes")
    raw = read(length, 8)
    if len(raw) != length:
        raise CorruptFile(f"{where}: only {len(raw)} of {length} header bytes could be read")
    header = parse_header(raw, size, where)
    if header.size != size:
        _wrong_size(header, size, where)
    return header


def parse_header(raw: bytes, size: int, where: str) -> Header:
    """Check the JSON of a header (without its 8 length bytes). `size` of the result is the file size that the header
    asks for."""
    if not raw.startswith(b"{"):
        found = "a JSON array" if raw.lstrip()[:1] == b"[" else f"{raw[:1]!r}"
        parse_json(raw, where, 8)  # prefers the message about UTF-8 or JSON where that is the trouble
        raise CorruptFile(f"{where}: the header must be a JSON object; found {found} at byte 8")
    table = parse_json(raw, where, 8)
    metadata = _metadata(table.pop("__metadata__", None), where)
    unsupported = []
    tensors = []
    for name, fields in table.items():
        if type(fields) is not dict or fields.keys() != _FIELDS:
            raise CorruptFile(
                f"{where}: tensor {safe_name(name)}: expected an object with dtype, shape and data_offsets, found "
                f"{_shown(fields)}"
            )
        dtype, offsets = fields["dtype"], fields["data_offsets"]
        if type(dtype) is not str or dtype not in ITEMSIZE:
            unsupported.append(f"{safe_name(name)} ({_shown(dtype)})")
            continue
        nbytes = _nbytes(fields["shape"], ITEMSIZE[dtype], name, where)
        shape = tuple(fields["shape"])
        if type(offsets) is not list or len(offsets) != 2 or type(offsets[0]) is not int or type(offsets[1]) is not int:
            raise CorruptFile(
                f"{where}: tensor {safe_name(name)}: data_offsets must be two integers, found {_shown(offsets)}"
            )
        begin, end = offsets
        if not 0 <= begin <= end <= MAX_INT:
            raise CorruptFile(
                f"{where}: tensor {safe_name(name)}: data_offsets {_shown(offsets)} are not an ascending pair of "
                "63-bit numbers"
            )
        if end - begin != nbytes:
            raise CorruptFile(
                f"{where}: tensor {safe_name(name)}: {dtype} {list(shape)} takes {nbytes} bytes, data_offsets give it "
                f"{end - begin}"
            )
        tensors.append((begin, end, name, dtype, shape))
    if unsupported:
        raise UnsupportedDtype(
            f"{where}: dtype not supported: {name_list(unsupported)}. Supported: {', '.join(ITEMSIZE)}"
        )
    _check_text([*table, *metadata, *metadata.values()], where)
    start = 8 + len(raw)
    tensors.sort(key=lambda t: t[:2])
    _check_tiling(tensors, where)
    entries = {
        name: TensorEntry(dtype, shape, start + begin, end - begin) for begin, end, name, dtype, shape in tensors
    }
    needed = start + (tensors[-1][1] if tensors else 0)
    digest = hashlib.blake2b(struct.pack("<Q", len(raw)) + raw, digest_size=16).hexdigest()
    return Header(entries, metadata, needed, digest)


def _metadata(found: Any, where: str) -> dict[str, str]:
    if found is None:
        return {}
    if type(found) is not dict or not all(type(v) is str for v in found.values()):
        raise CorruptFile(f"{where}: __metadata__ must map text to text, found {_shown(found)}")
    return found


def _nbytes(shape: Any, itemsize: int, name: str, where: str) -> int:
    """Bytes of a tensor; its shape is checked on the way."""
    if type(shape) is not list:
        raise CorruptFile(f"{where}: tensor {safe_name(name)}: the shape must be a list, found {_shown(shape)}")
    nbytes = itemsize
    for n in shape:
        if type(n) is not int or n < 0:
            raise CorruptFile(
                f"{where}: tensor {safe_name(name)}: the shape {_shown(shape)} has entries that are no sizes"
            )
        nbytes *= n
        if nbytes > MAX_INT:
            raise CorruptFile(f"{where}: tensor {safe_name(name)}: the size of shape {_shown(shape)} overflows 64 bits")
    return nbytes


def _check_text(texts: list[str], where: str) -> None:
    """Half a surrogate pair (an escape such as \\ud800) is not text: no other safetensors reader would take it."""
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError:
        bad = next(text for text in texts if any("\ud800" <= c <= "\udfff" for c in text))
        raise CorruptFile(f"{where}: {safe_name(bad)} is not valid Unicode") from None


def _check_tiling(tensors: list[tuple[int, int, str, str, tuple[int, ...]]], where: str) -> None:
    """Each byte of the data belongs to exactly one tensor."""
    reached, last = 0, None
    for begin, end, name, _, _ in tensors:
        if begin < reached and last is not None:
            raise CorruptFile(
                f"{where}: tensors {safe_name(last)} and {safe_name(name)} overlap by {reached - begin} bytes (at data "
                f"byte {begin})"
            )
        if begin > reached:
            raise CorruptFile(
                f"{where}: {begin - reached} data bytes before tensor {safe_name(name)} (from data byte {reached}) "
                "belong to no tensor"
            )
        if end > begin or last is None:
            reached, last = end, name


def _wrong_size(header: Header, size: int, where: str) -> None:
    if size > header.size:
        raise CorruptFile(
            f"{where}: {size - header.size} bytes after the last tensor belong to no tensor (expected {header.size} "
            f"bytes, found {size})"
        )
    cut = [name for name, t in header.tensors.items() if t.offset + t.nbytes > size]
    raise CorruptFile(
        f"{where}: the file is cut off: expected {header.size} bytes, found {size}. Incomplete: {name_list(cut)}. "
        "Download it again"
    )


def _shown(value: Any) -> str:
    text = reprlib.repr(value)  # escaped, and short whatever the value
    return text if len(text) <= 120 else f"{text[:120]}..."
