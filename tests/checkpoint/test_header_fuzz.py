"""Mutated headers: the parser returns a header whose tensors tile the file, or raises a MergeError; nothing else."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from pymerge.checkpoint import open_checkpoint
from pymerge.errors import InputError
from tests.checkpoint.raw import entry

SEED = {
    "__metadata__": {"format": "pt"},
    "a.weight": entry("F32", [2, 3], 0, 24),
    "b": entry("BF16", [4], 24, 32),
    "ä": entry("U8", [], 32, 33),
}
PIECES = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\ud800", b"\\u0000", b"-", b"1e9", b"NaN", b"null", b"0"]
PIECES += [b"99999999999999999999", b'"a.weight"', b'"shape"', b'"F4"', b"\xff", b"\x00", b" "]


def mutate(raw: bytes, generator: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(generator.choice([1, 1, 1, 2, 5])):
        at = generator.randrange(len(data))
        what = generator.randrange(5)
        if what == 0:
            data[at] ^= 1 << generator.randrange(8)
        elif what == 1:
            data[at : at + generator.randrange(1, 9)] = generator.choice(PIECES)
        elif what == 2:
            data[at:at] = generator.choice(PIECES)
        elif what == 3:
            del data[at : at + generator.randrange(1, 20)]
        else:
            begin = generator.randrange(len(data))
            data[at:at] = data[begin : begin + generator.randrange(1, 60)]
    return bytes(data)


def check(path: Path) -> bool:
    """True where we accept the file; then the safetensors library must accept it too and see the same."""
    try:
        with open_checkpoint(path) as checkpoint:
            tensors = {name: (t.dtype, list(t.shape), t.offset, t.nbytes) for name, t in checkpoint.items()}
    except InputError as e:
        assert str(e).isprintable()
        return False
    size = path.stat().st_size
    reached = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    for _, _, offset, nbytes in tensors.values():
        assert offset == reached
        reached += nbytes
    assert reached == size
    try:
        with safe_open(path, "pt") as library:
            assert {
                n: (library.get_slice(n).get_dtype(), library.get_slice(n).get_shape()) for n in library.keys()
            } == {n: (dtype, shape) for n, (dtype, shape, _, _) in tensors.items()}
    except SafetensorError as e:
        raise AssertionError(f"accepted what safetensors refuses: {e}") from e
    return True


@pytest.mark.parametrize("count", [3000, pytest.param(30_000, marks=pytest.mark.slow)])
def test_mutated_headers(tmp_path: Path, count: int) -> None:
    path = tmp_path / "model.safetensors"
    text = json.dumps(SEED, ensure_ascii=False).encode()
    whole = struct.pack("<Q", len(text)) + text + bytes(33)
    path.write_bytes(whole)
    assert check(path)
    generator, accepted = random.Random(0), 0
    for _ in range(count):
        if generator.random() < 0.2:
            data = mutate(whole, generator)
        else:
            changed = mutate(text, generator)
            data = struct.pack("<Q", len(changed)) + changed + bytes(33)
        path.write_bytes(data)
        accepted += check(path)
    assert accepted > count // 100  # renamed tensors and the like: the test sees both outcomes
