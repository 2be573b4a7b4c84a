"""Is a merged model on disk what was written? Checksums, headers, finite values."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from pymerge import _C
from pymerge.checkpoint import ITEMSIZE, AnyTensor, open_checkpoint, safe_name
from pymerge.engine.arena import Arena
from pymerge.engine.check import FLOATS
from pymerge.errors import CorruptFile, InputError

CHUNK = 8 << 20  # bytes read at a time
LOADERS = {  # by the file that says what to load
    "model_index.json": ("diffusers", "DiffusionPipeline"),
    "modules.json": ("sentence_transformers", "SentenceTransformer"),
    "config.json": ("transformers", "AutoModel"),
}


def verify(folder: str | Path, *, load: bool = False) -> dict[str, Any]:
    """Reads every tensor of a merged model, and what the method left beside them, again and compares with merge.json.

    load     also load the model, on the CPU, with transformers (AutoModel), diffusers or sentence-transformers
    Returns  {"tensors", "bytes"}
    Raises   CorruptFile naming every tensor that is not what was written, or holds NaN or Inf."""
    folder = Path(folder)
    path = folder / "merge.json"
    if not path.is_file():
        raise InputError(f"{folder}: no merge.json here: only models that pymerge wrote can be verified")
    summary = json.loads(path.read_text())
    wanted: dict[str, str] = summary["checksums"]
    finite = summary["relaxations"].get("nonfinite") != "keep"
    arena, problems, total = Arena(CHUNK), [], 0
    block = arena.take(CHUNK)
    with open_checkpoint(folder) as checkpoint:
        problems += [f"{safe_name(name)}: missing" for name in wanted if name not in checkpoint]
        problems += [f"{safe_name(name)}: not in merge.json" for name in checkpoint if name not in wanted]
        for name, tensor in checkpoint.items():
            crc, bad = scan(tensor, block.view, block.address)
            total += tensor.nbytes
            if name in wanted and f"{crc:08x}" != wanted[name]:
                problems.append(f"{safe_name(name)}: checksum {crc:08x}, written was {wanted[name]}")
            elif bad and finite:
                problems.append(f"{safe_name(name)}: {bad} NaN or Inf")
        count = len(checkpoint)
    for name, crc in summary.get("side_checksums", {}).items():
        size, problem = scan_file(folder / name, crc, block.view, block.address)
        total += size
        problems += [f"{name}: {problem}"] if problem else []
    if problems:
        what = "tensor(s) or file(s) are not what was written"
        raise CorruptFile(f"{folder}: {len(problems)} {what}:\n" + "\n".join(problems[:20]))
    if load:
        load_with_its_library(folder)
    return {"tensors": count, "bytes": total}


def scan(tensor: AnyTensor, view: memoryview, address: int) -> tuple[int, int]:
    """(checksum, number of NaN and Inf) of a tensor, read in chunks."""
    crc = bad = 0
    for start in range(0, tensor.nbytes, CHUNK):
        size = min(CHUNK, tensor.nbytes - start)
        tensor.read_into(view[:size], start)
        crc = _C.crc32c((address, size), crc)
        if tensor.dtype in FLOATS:
            bad += _C.count_nonfinite((address, tensor.dtype), size // ITEMSIZE[tensor.dtype])[0]
    return crc, bad


def scan_file(path: Path, wanted: str, view: memoryview, address: int) -> tuple[int, str]:
    """(bytes, what is wrong with it) of a file beside the weights, read in chunks."""
    if not path.is_file():
        return 0, "missing"
    crc = total = 0
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(view):
            crc, total = _C.crc32c((address, size), crc), total + size
    return total, "" if f"{crc:08x}" == wanted else f"checksum {crc:08x}, written was {wanted}"


def load_with_its_library(folder: Path) -> None:
    library, name = next(found for file, found in LOADERS.items() if (folder / file).exists() or file == "config.json")
    try:
        cls = getattr(import_module(library), name)
    except ImportError as error:
        raise InputError(f"loading needs {library}: pip install {library.replace('_', '-')}") from error
    try:
        if name == "SentenceTransformer":
            cls(str(folder), device="cpu", local_files_only=True)
        else:
            cls.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CorruptFile(f"{folder}: {library} does not load it: {error}") from error
