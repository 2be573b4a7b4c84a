"""pytorch_model*.bin: pickled weights, read only where the user allows it, and then by PyTorch's loader that builds
tensors only.

The pickle gives names, shapes and places; the bytes are read from the file like those of a safetensors file. This
module imports torch.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pymerge.checkpoint.header import ITEMSIZE, TORCH_NAME, TensorEntry, name_list, safe_name
from pymerge.errors import CorruptFile, InputError, UnsafeFile, UnsupportedDtype

if TYPE_CHECKING:
    from pymerge.checkpoint.read import WeightFile

MAX_PICKLE = 100_000_000
_CODE = {getattr(torch, torch_name): code for code, torch_name in TORCH_NAME.items()}


def read_pickled(file: WeightFile) -> dict[str, TensorEntry]:
    """Names and places of the tensors of a pickled state dict; nothing in it is executed.

    Raises   UnsafeFile if it asks for anything but tensors (S19); CorruptFile if it is no whole zip archive (S20);
             InputError."""
    where = safe_name(os.fspath(file.path), 400)
    with os.fdopen(os.dup(file.fd), "rb") as stream:
        file.digest = _check_archive(stream, where)
        state = _load_fake(stream, where)
    if not isinstance(state, Mapping):
        raise InputError(f"{where}: expected a state dict (names to tensors), found {type(state).__name__}")
    others = [
        str(name) for name, value in state.items() if not isinstance(name, str) or not isinstance(value, torch.Tensor)
    ]
    if others:
        raise InputError(f"{where}: expected a state dict of tensors only; these entries are not: {name_list(others)}")
    entries = {name: _entry(name, tensor, file.size, where) for name, tensor in state.items()}
    return dict(sorted(entries.items(), key=lambda item: item[1].offset))


def _check_archive(stream: BinaryIO, where: str) -> str:
    """The file is a whole zip archive as torch.save writes it; returns a hash of its table of contents."""
    try:
        archive = zipfile.ZipFile(stream)
        members = archive.infolist()
        order = [archive.read(m) for m in members if m.filename.endswith("/byteorder") and m.file_size < 64]
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError):
        raise CorruptFile(
            f"{where}: not a whole zip archive, which is what torch.save writes: the file is cut off or damaged (or of "
            "PyTorch "
            "before 1.6). Download it again"
        ) from None
    if any(m.compress_type != zipfile.ZIP_STORED for m in members):
        raise CorruptFile(f"{where}: has compressed members; torch.save never writes them")
    if any(m.file_size > MAX_PICKLE for m in members if m.filename.endswith(".pkl")):
        raise CorruptFile(f"{where}: its pickle is longer than {MAX_PICKLE} bytes")
    if any(o != b"little" for o in order):
        raise InputError(f"{where}: written on a big-endian machine; convert it to safetensors there")
    table = "\n".join(f"{m.filename} {m.header_offset} {m.file_size} {m.CRC:08x}" for m in members)
    return hashlib.blake2b(table.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _load_fake(stream: BinaryIO, where: str) -> Any:
    """The state dict with tensors that have no memory, only a place in the file. PyTorch's own messages are not passed
    on: they propose to load the file without protection."""
    try:
        stream.seek(0)
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(stream)  # pyright: ignore[reportArgumentType]
        if unsafe:
            raise UnsafeFile(
                f"{where}: its pickle asks for more than tensors: {name_list(sorted(unsafe))}. It was not loaded and "
                "nothing in it was "
                "executed. Ask its author for safetensors"
            )
        stream.seek(0)
        with FakeTensorMode():
            return torch.load(stream, weights_only=True, map_location="cpu")
    except UnsafeFile:
        raise
    except Exception as e:  # whatever a damaged pickle makes the loader raise
        if "Weights only load failed" in str(e):
            raise UnsafeFile(
                f"{where}: its pickle asks for more than tensors. It was not loaded. Ask its author for safetensors"
            ) from None
        raise CorruptFile(f"{where}: the pickle in it is damaged ({type(e).__name__}). Download it again") from None


def _entry(name: str, tensor: torch.Tensor, size: int, where: str) -> TensorEntry:
    code = _CODE.get(tensor.dtype)
    if code is None or tensor.layout != torch.strided:
        raise UnsupportedDtype(
            f"{where}: {safe_name(name)}: {tensor.dtype}, {tensor.layout} is not supported. Supported: "
            f"{', '.join(ITEMSIZE)}"
        )
    if not tensor.is_contiguous():
        raise InputError(
            f"{where}: {safe_name(name)}: stored transposed or strided {tuple(tensor.stride())}; convert to "
            "safetensors first"
        )
    place = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if place is None and tensor.numel():
        raise InputError(
            f"{where}: {safe_name(name)}: this PyTorch ({torch.__version__}) does not tell where its bytes lie"
        )
    offset = (place or 0) + int(tensor.storage_offset()) * tensor.element_size()
    nbytes = tensor.numel() * tensor.element_size()
    if offset + nbytes > size:
        raise CorruptFile(f"{where}: {safe_name(name)}: its bytes lie beyond the end of the file. Download it again")
    return TensorEntry(code, tuple(tensor.shape), offset, nbytes)
