"""A model at rest as a read-only mapping from parameter names to lazy tensors.

Headers are read when a checkpoint is opened, bytes when they are asked for: with preadv, never through a memory map,
because a file that shrinks under a map kills the process.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.adapted import AdaptedTensor
from pymerge.checkpoint.byte_tensor import ByteTensor
from pymerge.checkpoint.components import sources, stems_of
from pymerge.checkpoint.fp8 import FP8, ScaledTensor, dequantised
from pymerge.checkpoint.header import ITEMSIZE, TORCH_NAME, TensorEntry, read_header, safe_name
from pymerge.checkpoint.index import Prefer, check_index, read_json_object
from pymerge.checkpoint.layout import component_of
from pymerge.checkpoint.made import MadeTensor
from pymerge.checkpoint.moved import MovedTensor
from pymerge.checkpoint.rows import RowsTensor
from pymerge.checkpoint.stacked import PartTensor, StackedTensor, TurnedTensor
from pymerge.errors import ChangedInput, InputError, UnsupportedDtype
from pymerge.remote.files import RemoteFile
from pymerge.remote.mirror import is_remote, local_of, open_remote, shown

if TYPE_CHECKING:
    from torch import Tensor

MAX_CONFIG = 16_000_000


class WeightFile:
    """One weight file, opened once: its descriptor and what it looked like when it was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise InputError(f"{safe_name(str(path), 400)}: cannot be read: {e.strerror}") from e
        found = os.fstat(self.fd)
        self.size, self.mtime_ns, self.digest = found.st_size, found.st_mtime_ns, ""
        self.metadata: Mapping[str, str] = {}

    def read(self, count: int, offset: int) -> bytes:
        """Up to `count` bytes from `offset` on."""
        return os.pread(self.fd, count, offset)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on."""
        view = view.cast("B")
        done, wanted = 0, view.nbytes
        if self.fd < 0:
            raise ValueError(f"{self.path}: the checkpoint is closed")
        while done < wanted:
            try:
                got = os.preadv(self.fd, [view[done:]], offset + done)
            except OSError as e:
                raise InputError(
                    f"{safe_name(str(self.path), 400)}: reading failed at byte {offset + done}: {e.strerror}"
                ) from e
            if got == 0:
                raise ChangedInput(
                    f"{safe_name(str(self.path), 400)}: the file ended at byte {offset + done} while it was being "
                    f"read; it had {self.size} bytes"
                )
            done += got

    def check_unchanged(self) -> None:
        """The file at this path still has the size and the time that it had when it was opened."""
        try:
            now = os.stat(self.path)
        except OSError as e:
            raise ChangedInput(f"{safe_name(str(self.path), 400)}: gone while it was in use ({e.strerror})") from e
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise ChangedInput(
                f"{safe_name(str(self.path), 400)}: changed while it was in use: {self.size} bytes, mtime "
                f"{self.mtime_ns} ns when opened; "
                f"now {now.st_size} bytes, mtime {now.st_mtime_ns} ns. Start again with inputs that stand still"
            )

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class LazyTensor(ByteTensor):
    """A tensor in a file: name, shape, dtype (safetensors code) and place are known, its bytes are not read yet."""

    __slots__ = ("_source", "dtype", "name", "nbytes", "offset", "shape")

    def __init__(self, name: str, entry: TensorEntry, source: WeightFile | RemoteFile) -> None:
        self.name = name
        self.dtype, self.shape, self.offset, self.nbytes = entry
        self._source = source

    @property
    def file(self) -> Path | None:
        """The file that holds the bytes, from `offset` on; None for a tensor in memory."""
        return self._source.path

    @property
    def stored(self) -> str:
        """The dtype that a merge is rounded to."""
        return self.dtype

    def read_into(self, view: memoryview, start: int = 0) -> None:
        """Fill `view` with bytes start .. start + len(view) of the tensor. Raises ChangedInput if the file has become
        shorter."""
        if start < 0 or start + view.nbytes > self.nbytes:
            raise ValueError(
                f"{self.name}: bytes {start}..{start + view.nbytes} asked for, the tensor has {self.nbytes}"
            )
        self._source.read_into(view, self.offset + start)

    def __repr__(self) -> str:
        return f"LazyTensor({safe_name(self.name)}, {self.dtype}, {list(self.shape)})"


class MemoryTensor(ByteTensor):
    """A PyTorch tensor that looks like a LazyTensor."""

    __slots__ = ("_flat", "_tensor", "dtype", "name", "nbytes", "offset", "shape")
    file: Path | None = None

    def __init__(self, name: str, tensor: Tensor) -> None:
        code = _CODE.get(str(tensor.dtype).removeprefix("torch."))
        if code is None:
            raise UnsupportedDtype(
                f"{safe_name(name)}: dtype {tensor.dtype} is not supported. Supported: {', '.join(ITEMSIZE)}"
            )
        if tensor.device.type == "meta" or str(tensor.layout) != "torch.strided":
            raise InputError(
                f"{safe_name(name)}: a tensor with values in memory is needed, found {tensor.layout} on {tensor.device}"
            )
        self.name, self.dtype, self.offset = name, code, 0
        self.shape = tuple(tensor.shape)
        self.nbytes = math.prod(self.shape) * ITEMSIZE[code]
        self._tensor = tensor.detach()
        self._flat: Tensor | None = None

    @property
    def stored(self) -> str:
        """The dtype that a merge is rounded to."""
        return self.dtype

    def read_into(self, view: memoryview, start: int = 0) -> None:
        """Copy bytes start .. start + len(view) of the tensor into `view`."""
        import torch

        if start < 0 or start + view.nbytes > self.nbytes:
            raise ValueError(
                f"{self.name}: bytes {start}..{start + view.nbytes} asked for, the tensor has {self.nbytes}"
            )
        if view.nbytes == 0:
            return
        if self._flat is None:  # a view of a contiguous tensor; of a strided one a copy, made once
            self._flat = self._tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        torch.frombuffer(view, dtype=torch.uint8).copy_(self._flat[start : start + view.nbytes])

    @property
    def lendable(self) -> bool:
        """Whether `lend` gives its bytes without a copy."""
        return self._tensor.device.type == "cpu" and self._tensor.is_contiguous() and self.nbytes > 0

    def lend(self, start: int, size: int) -> memoryview:
        """Bytes start .. start + size of the tensor itself. Not to be written to."""
        import torch

        return self._tensor.reshape(-1).view(torch.uint8).numpy().data[start : start + size]

    def load(self) -> Tensor:
        """The tensor itself, not a copy."""
        return self._tensor

    def __repr__(self) -> str:
        return f"MemoryTensor({safe_name(self.name)}, {self.dtype}, {list(self.shape)})"


_CODE = {torch_name: code for code, torch_name in TORCH_NAME.items()}
AnyTensor = (
    LazyTensor
    | MemoryTensor
    | AdaptedTensor
    | MovedTensor
    | MadeTensor
    | ScaledTensor
    | StackedTensor
    | PartTensor
    | TurnedTensor
    | RowsTensor
)


class Checkpoint(Mapping[str, AnyTensor]):
    """A model's tensors by name, in the order of their bytes on disk. Close it, or use it as a context manager.

    path            what it was opened from; None for tensors in memory
    folder          the folder with config.json and the tokenizer; None where there is none
    config          config.json as a dict, or None
    notes           how its tensors differ from those in the files, for the summary
    config_changes  what its config.json must say otherwise for the tensors as they are here: dotted key -> value, None
                    removes it"""

    notes: tuple[str, ...] = ()
    config_changes: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        path: Path | None,
        folder: Path | None,
        tensors: Mapping[str, AnyTensor],
        files: list[WeightFile | RemoteFile],
        *,
        pickled: bool = False,
    ) -> None:
        self.path, self.folder, self.pickled = path, folder, pickled
        self._tensors, self._files = tensors, files
        self._token = "" if path else secrets.token_hex(16)
        self.config: dict[str, Any] | None = None
        if folder is not None and os.path.lexists(folder / "config.json"):  # a broken link is no missing file
            self.config = read_json_object(folder / "config.json", MAX_CONFIG)

    def __getitem__(self, name: str) -> AnyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    @property
    def files(self) -> tuple[WeightFile | RemoteFile, ...]:
        """The weight files: path, size, mtime_ns (or a remote version), digest (hash of the header), metadata."""
        return tuple(self._files)

    @property
    def where(self) -> str:
        """The path, or the URL that it stands for."""
        return "in memory" if self.path is None else shown(self.path)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._tensors.values())

    def file_order(self) -> list[str]:
        """The names in the order in which reading is sequential."""
        return list(self._tensors)

    def viewed(
        self,
        tensors: Mapping[str, AnyTensor],
        *,
        notes: Sequence[str] = (),
        config_changes: Mapping[str, Any] = MappingProxyType({}),
    ) -> Checkpoint:
        """This checkpoint with other tensors, made of its own. It uses the files of this one, which stays the one to
        close."""
        view = copy(self)
        view._tensors = tensors
        view.notes = (*self.notes, *notes)
        view.config_changes = {**self.config_changes, **config_changes}
        return view

    @property
    def place(self) -> str:
        """Where the model's files are, for who comes from elsewhere: a URL, or a path from the root."""
        assert self.path is not None
        return self.where if is_remote(self.path) else os.path.realpath(self.path)

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed merge must find again: size, time and header hash of every file, and how its tensors are read.
        For tensors in memory a token of this very object, since only it can vouch for their values."""
        if self.path is None:
            return {"memory": self._token}
        return {
            "path": self.place,
            "files": [[self.name_of(f.path), f.size, f.mtime_ns, f.digest] for f in self._files],
        } | ({"notes": list(self.notes)} if self.notes else {})

    def name_of(self, file: Path) -> str:
        """A weight file's path below the model's folder."""
        folder = self.folder
        return file.relative_to(folder).as_posix() if folder is not None and folder in file.parents else file.name

    @cached_property
    def components(self) -> dict[str, str]:
        """Component -> stem of the names of its weight files, "" for those in the folder itself; empty for a plain
        model."""
        return stems_of(self.folder) if self.folder is not None else {}

    def check_unchanged(self) -> None:
        """Raises ChangedInput if a weight file is not what it was when it was opened."""
        for file in self._files:
            file.check_unchanged()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({self.where}, {len(self)} tensors)"


def open_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any], *, allow_pickle: bool = False, prefer: Prefer | None = None
) -> Checkpoint:
    """Open a model: a Hugging Face folder, a .safetensors file, an index file, a PEFT adapter folder (over
    the base that it names), the URL of one of them, or a mapping from names to tensors.

    allow_pickle  read pytorch_model*.bin too, with a loader that builds tensors only
    prefer        "single" or "sharded", for a folder that holds both
    Raises        InputError and its subclasses, with file, tensor, expected and found."""
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Mapping):
        return _from_mapping(source)
    if isinstance(source, str):
        source = local_of(source)
    from pymerge.checkpoint.lora import is_adapter, open_adapter  # made of checkpoints

    if is_adapter(source):
        return open_adapter(source, allow_pickle=allow_pickle)
    path = Path(source)
    parts = sources(path, allow_pickle=allow_pickle, prefer=prefer)
    with contextlib.ExitStack() as on_error:
        files: list[WeightFile | RemoteFile] = []
        tensors: dict[str, AnyTensor] = {}
        names = [component for component, _ in parts]
        for component, found in parts:
            held: dict[Path, list[str]] = {}
            for at in found.files:
                file = open_remote(at) or WeightFile(at)
                on_error.callback(file.close)
                files.append(file)
                here = _pickled_entries(file) if found.pickled and isinstance(file, WeightFile) else _entries(file)
                held[at] = list(here)
                for own, entry in here.items():
                    name = f"{component}/{own}" if component else own
                    if component_of(name, names) != component:
                        where = f"{shown(path)}: {safe_name(name)} in {at.name}"
                        raise InputError(f"{where} is named like another component's")
                    tensors[name] = LazyTensor(name, entry, file)
            check_index(found, held)
        folder = path if path.is_dir() else parts[0][1].folder
        if folder is not None and folder != path and stems_of(folder):
            folder = None  # a file of one component is not the folder's model
        pickled = any(found.pickled for _, found in parts)
        checkpoint = Checkpoint(path, folder, tensors, files, pickled=pickled)
        if any(tensor.dtype in FP8 for tensor in tensors.values()):
            checkpoint = dequantised(checkpoint)
        on_error.pop_all()
    return checkpoint


def _entries(file: WeightFile | RemoteFile) -> Mapping[str, TensorEntry]:
    header = read_header(file.read, file.size, shown(file.path))
    file.digest, file.metadata = header.digest, header.metadata
    return header.tensors


def _pickled_entries(file: WeightFile) -> Mapping[str, TensorEntry]:
    from pymerge.checkpoint.pickle_file import read_pickled  # imports torch

    return read_pickled(file)


def _from_mapping(source: Mapping[str, Any]) -> Checkpoint:
    tensors: dict[str, AnyTensor] = {}
    for name, tensor in source.items():
        if not isinstance(name, str) or not all(hasattr(tensor, a) for a in ("dtype", "shape", "detach", "layout")):
            raise InputError(
                f"expected a mapping from names to PyTorch tensors, found {safe_name(str(name))}: "
                f"{type(tensor).__name__}"
            )
        tensors[name] = MemoryTensor(name, tensor)
    return Checkpoint(None, None, tensors, [])
