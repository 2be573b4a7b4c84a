"""A cache of the Hugging Face Hub on disk, as huggingface_hub lays it out."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

MAIN = "1" * 40


def cache_model(cache: Path, name: str, files: Path, *, commit: str = MAIN, refs: tuple[str, ...] = ("main",)) -> Path:
    """Puts the files of a folder into the cache as a model's snapshot; its folder."""
    model = cache / f"models--{name.replace('/', '--')}"
    snapshot = model / "snapshots" / commit
    for folder in (model / "blobs", model / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    for ref in refs:
        (model / "refs" / ref).write_text(commit)
    for file in files.iterdir():
        content = file.read_bytes()
        blob = model / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        os.symlink(os.path.relpath(blob, snapshot), snapshot / file.name)
    return snapshot
