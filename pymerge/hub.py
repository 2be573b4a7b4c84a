"""Models by their names on the Hugging Face Hub: from a name to the folder in the local cache that holds it.

The cache is read by huggingface_hub (extra `hf`), where HF_HOME says that it is. Nothing is downloaded unless that was
asked for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from pymerge.errors import InputError

NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
NO_NAMES = (".safetensors", ".bin", ".pt", ".pth", ".json", ".jsonl", ".txt")  # of files
SNAPSHOT = re.compile(r"models--[^/]+/snapshots/([0-9a-f]{40})(?=/|\+|$)")
# What a download fetches: no code, no pickles, no weights of other frameworks.
DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.bpe", "*.codes", "*.jinja"]
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
MAX_INDEX = 100_000_000


@dataclass(frozen=True)
class Access:
    """cache_dir: of the Hub's cache (None: huggingface_hub's own); download: fetch what is not there."""

    cache_dir: str | None = None
    download: bool = False


CACHE_ONLY = Access()
_access: ContextVar[Access] = ContextVar("hub_access", default=CACHE_ONLY)


@contextmanager
def access(cache_dir: str | os.PathLike[str] | None = None, *, download: bool = False) -> Iterator[None]:
    """How names on the Hub are looked up inside this block."""
    token = _access.set(Access(None if cache_dir is None else os.fspath(cache_dir), download))
    try:
        yield
    finally:
        _access.reset(token)


def downloads() -> bool:
    """Whether what is not in the cache may be fetched."""
    return _access.get().download


def is_name(text: str) -> bool:
    """Whether text has the form of a name on the Hub: `name` or `owner/name`."""
    return NAME.fullmatch(text) is not None and len(text) <= 200 and not text.endswith(NO_NAMES)


def commit_of(path: str) -> str | None:
    """The commit whose snapshot a path in the cache is; of `base+adapter` as `commit+commit`."""
    return "+".join(SNAPSHOT.findall(path)) or None


def snapshot(name: str, revision: str | None = None) -> str:
    """The folder of the cache that holds a model at a revision (branch, tag, commit; None: main).

    Raises   InputError: not in the cache, or only in part (lists what is missing); says how to download it."""
    wanted = _access.get()
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            "no such file or folder; to look for a model of that name in the Hugging Face cache: pip install "
            "'pymerge[hf]'"
        ) from None
    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    how = f"download it with --download, or: {command}"
    if wanted.cache_dir is not None:
        how += f" --cache-dir {wanted.cache_dir}"
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=wanted.cache_dir,
            local_files_only=not wanted.download,
            allow_patterns=DOWNLOADED if wanted.download else None,
        )
    except Exception as e:  # of huggingface_hub, its HTTP client, the disk
        if wanted.download:
            raise InputError(f"cannot be downloaded: {type(e).__name__}: {' '.join(str(e).split())[:300]}") from e
        at = f" at revision {revision}" if revision else ""
        raise InputError(f"no such file or folder, and no such model{at} in {_cache(wanted)}: {how}") from e
    if missing := lacking(Path(folder)):
        listed = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
        raise InputError(f"incomplete in the cache ({folder}), lacks {listed}: {how}")
    return os.fspath(folder)


def lacking(folder: Path) -> list[str]:
    """Files that a model, or an adapter, cannot be read without and that are not in its folder; a link to nothing is no
    file."""
    names = {name for name in os.listdir(folder) if (folder / name).exists()}
    if "adapter_config.json" in names:
        return [] if names & set(ADAPTER) else [ADAPTER[0]]
    if "model_index.json" in names:
        return []  # the components are in folders of their own, whose reader knows what they need
    missing = [] if "config.json" in names else ["config.json"]
    indices = sorted(name for name in names if name.endswith(".index.json"))
    if any(name.endswith(".safetensors.index.json") for name in indices):
        indices = [name for name in indices if name.endswith(".safetensors.index.json")]
    if WEIGHTS[0] in names or not (indices or any(name.endswith((".safetensors", ".bin")) for name in names)):
        return missing + ([] if WEIGHTS[0] in names else [WEIGHTS[0]])
    shards = {shard for index in indices for shard in _shards(folder / index)}
    return missing + sorted(shards - names)


def _shards(index: Path) -> list[str]:
    """File names that an index promises; what is wrong with it is for the reader of the model to say."""
    try:
        if index.stat().st_size > MAX_INDEX:
            return []
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [file for file in files if isinstance(file, str)]


def _cache(wanted: Access) -> str:
    from huggingface_hub import constants

    return f"the Hugging Face cache {wanted.cache_dir or constants.HF_HUB_CACHE}"
