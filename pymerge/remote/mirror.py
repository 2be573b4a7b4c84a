"""The local folder that stands for a remote model."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from pymerge import hub
from pymerge.errors import InputError, UnsafePath
from pymerge.remote.blocks import REQUESTS
from pymerge.remote.files import RemoteFile, RemoteObject
from pymerge.remote.urls import asked, file_system, is_url, local_path, protocol

WEIGHTS = "*.safetensors"
# Files that are copied whole: all that a loader of the merged model, or pymerge, may read beside the weights.
SMALL = (
    *(pattern for pattern in hub.DOWNLOADED if pattern != WEIGHTS),
    *("tokenizer.model.v*", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".json", ".jsonl")  # URLs that end so are no folders
LISTS = ("model_index.json", "modules.json")  # of the components of a model, in folders of their own
TEMPLATES = "additional_chat_templates"
MAX_SMALL = 100_000_000  # bytes of one
MAX_ALL = 500_000_000  # bytes of those of one model
MAX_FILES = 10_000
MAX_DEPTH = 4
FIRST_ATTEMPTS = 1  # where nothing has been reached yet; file systems try again by themselves


@dataclass(frozen=True)
class Mirror:
    folder: Path
    url: str  # of what the folder stands for
    state: tuple[object, ...]  # of the remote files when the folder was made
    weights: dict[Path, RemoteObject]


_lock = threading.Lock()
_mirrors: list[Mirror] = []


def local_of(reference: str) -> str:
    """The local path that stands for a URL, with the same files at the same places; of a path the path itself.

    file:// is a path, and hf:// the folder in the Hub's cache unless downloads are asked for. All else is looked up
    anew; where nothing has changed the answer is that of before. The folder lives as long as the process.
    Raises   InputError, UnsafePath; both start with the URL."""
    if not is_url(reference):
        return reference
    if (url := local_path(reference)) != reference:
        return url
    if protocol(url) == "hf" and not hub.downloads():
        return _in_cache(url)
    url = url.rstrip("/")
    system, key = file_system(url)
    single = key.endswith(FILES)
    folder_url, name = url.rpartition("/")[::2] if single else (url, "")
    if single and not name.endswith(".index.json") and name != "model.safetensors":
        found = [("", [asked(lambda: system.info(key), url, FIRST_ATTEMPTS) | {"name": key}])]
    else:
        at = key.rpartition("/")[0] if single else key
        found = _listed(system, at, folder_url)
    with _lock:
        path = _folder_of(system, found, folder_url) / name
    if not path.exists():
        raise InputError(f"{url}: no such file")
    return os.fspath(path)


def open_remote(path: Path) -> RemoteFile | None:
    """The remote weight file that a local one stands for, opened; None for a file that stands for none."""
    mirror = _mirror_of(path)
    found = mirror.weights.get(path) if mirror is not None else None
    return RemoteFile(found, path) if found is not None else None


def shown(path: str | os.PathLike[str]) -> str:
    """A path as the user knows it: the URL that it stands for, or itself."""
    mirror = _mirror_of(Path(path))
    if mirror is None:
        return os.fspath(path)
    return "/".join([mirror.url, *Path(path).relative_to(mirror.folder).parts])


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path stands for a URL, or is one."""
    return is_url(os.fspath(path)) or _mirror_of(Path(path)) is not None


def _mirror_of(path: Path) -> Mirror | None:
    return next((m for m in _mirrors if m.folder == path or m.folder in path.parents), None)


def _in_cache(url: str) -> str:
    """hf://owner/name@revision/folder, by the Hub's cache."""
    parts = url.partition("://")[2].strip("/").split("/")
    cut = next((n + 1 for n, part in enumerate(parts[:2]) if "@" in part), min(2, len(parts)))
    name, _, revision = "/".join(parts[:cut]).partition("@")
    if not hub.is_name(name) or any(part in ("", ".", "..") for part in parts):
        raise InputError(f"{url}: must be hf://OWNER/NAME, hf://OWNER/NAME@REVISION or a folder in one")
    try:
        found = os.path.join(hub.snapshot(name, revision or None), *parts[cut:])
    except InputError as e:
        raise InputError(f"{url}: {e}") from e
    if not os.path.exists(found):
        raise InputError(f"{url}: not in the Hub's cache; --download reads it over the network")
    return found


def _listed(system: Any, key: str, url: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """The folders that are read of a model, relative to it, and what is in each."""
    system.invalidate_cache()
    found = [("", _entries(system, key, url))]
    names = {_name(entry) for entry in found[0][1]}
    inside = names if names & set(LISTS) else {TEMPLATES}
    for at, entries in found:
        for entry in entries:
            name = _name(entry)
            if entry["type"] == "directory" and (at or name in inside) and at.count("/") < MAX_DEPTH:
                below = f"{at}{name}/"
                found.append((below, _entries(system, entry["name"].rstrip("/"), f"{url}/{below}")))
    return found


def _entries(system: Any, key: str, url: str) -> list[dict[str, Any]]:
    """What a folder holds, without itself; names that no local file can have are refused."""
    listed = asked(lambda: system.ls(key, detail=True), url, FIRST_ATTEMPTS)
    entries = [entry for entry in listed if entry["name"].strip("/") != key.strip("/")]
    if len(entries) > MAX_FILES:
        raise InputError(f"{url}: more than {MAX_FILES} files: name the folder of one model")
    for entry in entries:
        name = _name(entry)
        if name in ("", ".", "..") or "\0" in name or len(name.encode("utf-8", "surrogatepass")) > 255:
            raise UnsafePath(f"{url}: holds {name[:100]!r}, which is no name of a file")
    if not entries:
        raise InputError(f"{url}: no such folder, or an empty one")
    return sorted(entries, key=_name)


def _name(entry: dict[str, Any]) -> str:
    return entry["name"].rstrip("/").rpartition("/")[2]


def _folder_of(system: Any, found: Sequence[tuple[str, list[dict[str, Any]]]], url: str) -> Path:
    """The folder that stands for these files: one that is there already, or a new one."""
    small: dict[str, RemoteObject] = {}
    weights: dict[str, RemoteObject] = {}
    folders, others = [], []
    for at, entries in found:
        for entry in entries:
            name = at + _name(entry)
            if entry["type"] == "directory":
                folders.append(name)
            elif any(fnmatchcase(_name(entry), pattern) for pattern in SMALL):
                small[name] = RemoteObject(system, entry["name"], f"{url}/{name}", entry)
            elif fnmatchcase(name, WEIGHTS):
                weights[name] = RemoteObject(system, entry["name"], f"{url}/{name}", entry)
            else:
                others.append(name)
    _check_sizes(small, url)
    state = (*folders, *others, *((name, file.size, file.version) for name, file in (small | weights).items()))
    for mirror in _mirrors:
        if (mirror.url, mirror.state) == (url, state):
            return mirror.folder
    with ThreadPoolExecutor(REQUESTS) as pool:
        contents = dict(zip(small, pool.map(RemoteObject.read_whole, small.values()), strict=True))
        list(pool.map(RemoteObject.fetch_head, weights.values()))
    folder = Path(tempfile.mkdtemp(dir=_root())) / (
        re.sub(r"[^\w.-]", "_", url.rpartition("/")[2]).strip(".") or "model"
    )
    folder.mkdir()
    for name in folders:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in (*weights, *others):
        (folder / name).touch()
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    _mirrors.append(Mirror(folder, url, state, {folder / name: file for name, file in weights.items()}))
    return folder


def _check_sizes(small: dict[str, RemoteObject], url: str) -> None:
    for file in small.values():
        if file.size > MAX_SMALL:
            raise InputError(f"{file.url}: {file.size} bytes; more than {MAX_SMALL} are read of weight files only")
    if sum(file.size for file in small.values()) > MAX_ALL:
        raise InputError(f"{url}: more than {MAX_ALL} bytes of files beside the weights: name the folder of one model")


@cache
def _root() -> str:
    """A folder of this process, removed when it ends."""
    root, process = tempfile.mkdtemp(prefix="pymerge-remote-"), os.getpid()
    atexit.register(lambda: shutil.rmtree(root, ignore_errors=True) if os.getpid() == process else None)
    return root
