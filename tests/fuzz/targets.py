"""What the fuzzer calls: each target takes bytes as a stranger's file and lets through errors of pymerge only.

A target raises AssertionError where something is accepted that must not be. No torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from pymerge import _C
from pymerge.checkpoint.header import read_header
from pymerge.checkpoint.index import INDEX, read_weight_map, resolve
from pymerge.checkpoint.journal import JOURNAL, read_journal
from pymerge.checkpoint.lora import CONFIG, AdapterConfig, base_of_adapter
from pymerge.errors import MergeError
from pymerge.recipe import Recipe

MEMORY = Path("/dev/shm") if os.path.isdir("/dev/shm") else None  # a disk would be what is measured


def header(data: bytes) -> None:
    """A .safetensors file: length, header, data."""
    fd = os.memfd_create("fuzz")
    try:
        os.write(fd, data)
        found = read_header(partial(os.pread, fd), os.fstat(fd).st_size, "fuzz")
    finally:
        os.close(fd)
    (length,) = struct.unpack("<Q", data[:8])
    ends = sorted((entry.offset, entry.offset + entry.nbytes) for entry in found.tensors.values())
    at = 8 + length
    for first, last in ends:
        assert first == at or first == last, (first, at)
        at = max(at, last)
    assert at == len(data), "bytes that no tensor owns"


def index(data: bytes) -> None:
    """model.safetensors.index.json of a folder."""
    with folder(INDEX, data) as where:
        shards = set(read_weight_map(where / INDEX).values())
        for shard in shards:
            if re.fullmatch(r"[\w.-]{1,100}", shard) and shard not in (".", ".."):
                (where / shard).touch()
        found = resolve(where)
        assert {os.path.dirname(os.path.realpath(file)) for file in found.files} <= {os.path.realpath(where)}


def recipe(data: bytes) -> None:
    """The YAML of a recipe. What is accepted reads back to the same recipe."""
    with folder("recipe.yaml", data) as where:
        found = Recipe.from_yaml(where / "recipe.yaml", models_must_exist=False)
    assert Recipe.from_dict(found.to_dict(), models_must_exist=False).to_dict() == found.to_dict()


def adapter(data: bytes) -> None:
    """adapter_config.json of a PEFT adapter."""
    with folder(CONFIG, data) as where:
        config = AdapterConfig.read(where)
        for module in ("model.layers.0.self_attn.q_proj", "lm_head", ""):
            assert config.rank(module) >= 1
            assert abs(config.scale(module)) < float("inf")
        with contextlib.suppress(MergeError):  # the base that it names is hardly there
            base_of_adapter(where)


def journal(data: bytes) -> None:
    """The journal of an interrupted merge: lines with right checksums and whatever else, so that parsing goes on."""
    lines = [b"%08x %s" % (_C.crc32c(line), line) for line in data.split(b"\n")]
    with folder(JOURNAL, b"\n".join(lines)) as where:
        _, segments = read_journal(where / JOURNAL)
        for segment in segments:
            assert segment.start >= 0 and segment.nbytes >= 0 and isinstance(segment.name, str)


TARGETS: dict[str, Callable[[bytes], None]] = {f.__name__: f for f in (header, index, recipe, adapter, journal)}


def run(name: str, data: bytes) -> bool:
    """Whether the target accepted `data`; anything but acceptance or an error of pymerge is raised."""
    try:
        TARGETS[name](data)
    except MergeError as error:
        assert all(c.isprintable() or c == "\n" for c in str(error)), "an error that is not fit for a terminal"
        return False
    return True


@contextlib.contextmanager
def folder(name: str, data: bytes) -> Iterator[Path]:
    with TemporaryDirectory(dir=MEMORY) as made:
        (Path(made) / name).write_bytes(data)
        yield Path(made)
