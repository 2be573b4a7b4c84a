"""Statistics of one model in one safetensors file: written module by module, read lazily."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pymerge.checkpoint import Checkpoint, open_checkpoint, safe_name
from pymerge.errors import InputError
from pymerge.statistics.moments import Moments

FORMAT = "1"
KINDS = ("mean", "samples", "triangle")
_CODE = {torch.float32: "F32", torch.float64: "F64"}


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a statistics file says of itself.

    model    fingerprint of the model that was run; `weights` is equal for equal weight files
    data     what the samples were: a digest and a description
    modules  name of each linear module -> name of the one that holds the moments of its input (several may share one)
    transposed  the modules whose weight is stored [in, out] (GPT-2's Conv1D)
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    modules: Mapping[str, str]
    transposed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Moments of the inputs of a model's linear modules, in memory or read when asked for."""

    live: ClassVar[bool] = False  # whether moments come to be, and go, while a merge asks for them

    header: Header
    held: Mapping[str, Moments] = field(default_factory=dict, repr=False)
    file: Checkpoint | None = field(default=None, repr=False)
    rows: Mapping[str, int] = field(default_factory=dict, repr=False)  # of each module that holds moments

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(self.header.modules)

    def __contains__(self, module: object) -> bool:
        return module in self.header.modules

    def __getitem__(self, module: str) -> Moments:
        """The moments of a module's input; reads them from the file."""
        try:
            holder = self.header.modules[module]
        except KeyError:
            raise InputError(
                f"no statistics of {safe_name(module)}; there are some of {len(self.header.modules)} modules"
            ) from None
        if self.file is None:
            return self.held[holder]
        tensors = {kind: self.part(module, kind) for kind in KINDS}
        mean = tensors.pop("mean")
        assert mean is not None
        return Moments(rows=self.rows[holder], mean=mean, **tensors)

    def part(self, module: str, kind: str) -> Tensor | None:
        """One tensor of a module's moments (`mean`, `samples`, `triangle`), read alone; None: it is not kept."""
        holder = self.header.modules[module]
        if self.file is None:
            return getattr(self.held[holder], kind)
        name = f"{holder}.{kind}"
        return self.file[name].load() if name in self.file else None

    def width(self, module: str) -> int:
        """n of a module's input, without reading the moments."""
        holder = self.header.modules[module]
        return self.held[holder].width if self.file is None else self.file[f"{holder}.mean"].shape[0]

    def share_input(self, modules: Sequence[str]) -> bool:
        """Whether modules have one input."""
        return len({self.header.modules.get(module) for module in modules}) == 1

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed merge must find again."""
        if self.file is not None:
            return self.file.fingerprint()
        digest = hashlib.blake2b(repr(self.header).encode(), digest_size=16)
        for holder, moments in self.held.items():
            kept = moments.samples if moments.samples is not None else moments.triangle
            assert kept is not None
            digest.update(repr((holder, moments.rows, kept.dtype)).encode() + moments.mean.numpy().tobytes())
        return {"statistics": digest.hexdigest()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file that `open_statistics` reads; it appears complete or not at all."""
        with StatisticsWriter(Path(path)) as writer:
            for holder in dict.fromkeys(self.header.modules.values()):
                writer.add(holder, self[holder])
            writer.finish(self.header)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


class StatisticsWriter:
    """Moments go to disk as they come; the file appears under its name when it is finished."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.data = path.with_name(path.name + ".partial-data")
        self.file = open(self.data, "wb")
        self.tensors: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, int] = {}
        self.at = 0

    def add(self, module: str, moments: Moments) -> None:
        self.rows[module] = moments.rows
        for kind in KINDS:
            tensor: Tensor | None = getattr(moments, kind)
            if tensor is not None:
                raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
                entry = {"dtype": _CODE[tensor.dtype], "shape": list(tensor.shape)}
                self.tensors[f"{module}.{kind}"] = entry | {"data_offsets": [self.at, self.at + raw.nbytes]}
                self.file.write(raw)
                self.at += raw.nbytes

    def finish(self, header: Header) -> None:
        metadata = {
            "pymerge_statistics": FORMAT,
            "model": json.dumps(header.model, sort_keys=True),
            "data": json.dumps(header.data, sort_keys=True),
            "modules": json.dumps(header.modules),
            "rows": json.dumps(self.rows),
            "transposed": json.dumps(header.transposed),
        }
        text = json.dumps({"__metadata__": metadata} | self.tensors, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.file.close()
        with open(self.partial, "wb") as out, open(self.data, "rb") as data:
            out.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(data, out, 8 << 20)
            out.flush()
            os.fsync(out.fileno())
        os.replace(self.partial, self.path)

    def __enter__(self) -> StatisticsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()
        self.data.unlink(missing_ok=True)
        self.partial.unlink(missing_ok=True)


def open_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Open a statistics file; moments are read when asked for.

    Raises   InputError (not a statistics file, another format), CorruptFile."""
    file = open_checkpoint(path)
    metadata = file.files[0].metadata
    if metadata.get("pymerge_statistics") != FORMAT:
        file.close()
        found = metadata.get("pymerge_statistics", "none")
        raise InputError(
            f"{path}: no statistics file of format {FORMAT} (found: {found}); make one with `pymerge observe`"
        )
    parsed = {key: json.loads(metadata.get(key, "[]")) for key in ("model", "data", "modules", "rows", "transposed")}
    header = Header(
        model=parsed["model"],
        data=parsed["data"],
        modules=parsed["modules"],
        transposed=tuple(parsed["transposed"]),
    )
    return Statistics(header=header, file=file, rows=parsed["rows"])
