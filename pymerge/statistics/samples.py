"""Samples from files, as batches that a transformers model takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pymerge.errors import InputError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def batches_of(
    model: Path, data: Path, *, samples: int, length: int, batch_size: int, field: str = "text"
) -> Iterator[dict[str, Any]]:
    """Batches of keyword arguments for the model in the folder `model`.

    data     .jsonl (one object a line, `field` holds the text), .txt (one sample a line), a folder of images, or a
             folder that the datasets library has saved
    samples  how many to take, from the start
    length   longest text in tokens; longer ones are cut
    Raises   InputError (no samples, no such field, no tokenizer or image processor beside the model)"""
    if not data.exists():
        raise InputError(f"{data}: no such file or folder")
    if data.is_dir() and not (data / "dataset_info.json").exists():
        return images(model, data, samples, batch_size)
    return texts(model, list(islice(lines(data, field), samples)), data, length, batch_size)


def lines(data: Path, field: str) -> Iterator[str]:
    if data.is_dir():
        yield from dataset(data, field)
        return
    with open(data, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if data.suffix != ".jsonl":
                yield line.rstrip("\n")
                continue
            try:
                record = json.loads(line)
                yield str(record[field])
            except (ValueError, KeyError, TypeError):
                keys = f"has {', '.join(record)}" if isinstance(record := _object(line), dict) else "is no JSON object"
                raise InputError(
                    f"{data}, line {number}: needs a key {field!r}, it {keys} (--field names the key)"
                ) from None


def _object(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def dataset(data: Path, field: str) -> Iterator[str]:
    try:
        from datasets import load_from_disk  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(f"{data}: a saved dataset needs the datasets library: pip install datasets") from None
    found: Any = load_from_disk(str(data))
    found = next(iter(found.values())) if isinstance(found, dict) else found
    if field not in found.column_names:
        raise InputError(f"{data}: has no column {field!r}; its columns: {', '.join(found.column_names)} (--field)")
    for row in found:
        yield str(row[field])


def texts(model: Path, found: list[str], data: Path, length: int, batch_size: int) -> Iterator[dict[str, Any]]:
    if not found:
        raise InputError(f"{data}: holds no samples")
    tokenizer = beside(model, "AutoTokenizer", "tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Of one length together, so that little is padding; the order of samples does not change a sum.
    found = sorted(found, key=len)
    for at in range(0, len(found), batch_size):
        batch = tokenizer(
            found[at : at + batch_size], return_tensors="pt", truncation=True, max_length=length, padding=True
        )
        yield dict(batch)


def images(model: Path, data: Path, samples: int, batch_size: int) -> Iterator[dict[str, Any]]:
    paths = sorted(path for path in data.rglob("*") if path.suffix.lower() in IMAGES)[:samples]
    if not paths:
        raise InputError(f"{data}: holds no images ({', '.join(IMAGES)}) and no saved dataset")
    try:
        from PIL import Image
    except ImportError:
        raise InputError("observing on images needs Pillow: pip install pillow") from None
    processor = beside(model, "AutoImageProcessor", "image processor")
    for at in range(0, len(paths), batch_size):
        pictures = [Image.open(path).convert("RGB") for path in paths[at : at + batch_size]]
        yield dict(processor(pictures, return_tensors="pt"))


def beside(model: Path, cls: str, what: str) -> Any:
    """What transformers finds in the model's folder."""
    try:
        import transformers
    except ImportError:
        raise InputError('samples from files need transformers; install with: pip install "pymerge[hf]"') from None
    try:
        return getattr(transformers, cls).from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{model}: no {what} can be loaded from this folder: {str(error).splitlines()[0]}") from None
