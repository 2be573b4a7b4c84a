"""Which files make up a model: from a path to a checked list of weight files.

A path is a Hugging Face folder (one file, or shards with an index), one .safetensors file, or an index file. Pickled
weights (pytorch_model*.bin) only where they are allowed by name.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pymerge.checkpoint.header import name_list, parse_json, safe_name
from pymerge.checkpoint.layout import Layout
from pymerge.errors import AmbiguousModel, CorruptFile, InconsistentIndex, InputError, UnsafeFile, UnsafePath
from pymerge.remote.mirror import is_remote, shown
from pymerge.remote.urls import is_collapsed

Prefer = Literal["single", "sharded"]
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_INDEX = 100_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_SINGLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class Source:
    """The weight files of one model. `weight_map` is what the index promises (name -> file name), None without an
    index."""

    path: Path
    folder: Path | None  # holds config.json and the tokenizer; None for a loose file
    files: tuple[Path, ...]
    weight_map: Mapping[str, str] | None
    pickled: bool = False


def resolve(path: str | os.PathLike[str], *, allow_pickle: bool = False, prefer: Prefer | None = None) -> Source:
    """The weight files of the model at `path`, without opening any of them.

    prefer   "single" or "sharded": which one to take where a folder holds both
    Raises   AmbiguousModel (S17), UnsafePath (S14), InputError (nothing there, missing shards: S15), UnsafeFile (S18,
             S19)."""
    if prefer not in (None, "single", "sharded"):
        raise InputError(f"prefer: expected 'single' or 'sharded', found {prefer!r}")
    where = Path(path)
    if where.is_dir():
        return _resolve_folder(where, allow_pickle, prefer)
    if not where.exists():
        raise InputError(_absent(os.fspath(path)))
    _require_regular(where)
    if re.search(r"\.index(\.\w+)?\.json$", where.name):
        return _from_index(where, where, allow_pickle)
    if where.suffix == ".safetensors":
        return Source(where, where.parent if where.name == SINGLE else None, (where,), None)
    if where.suffix in PICKLED:
        _require_pickle_allowed([where], allow_pickle)
        return Source(where, where.parent if where.name == PICKLE_SINGLE else None, (where,), None, pickled=True)
    raise InputError(
        f"{_shown(where)}: not a model that pymerge reads (a folder, .safetensors, or an index.json of shards)"
    )


def _resolve_folder(folder: Path, allow_pickle: bool, prefer: Prefer | None) -> Source:
    names = sorted(os.listdir(folder))
    single, index = (
        _standard_or_only(names, SINGLE, ".safetensors"),
        _standard_or_only(names, INDEX, ".safetensors.index.json"),
    )
    if "adapter_config.json" in names and SINGLE not in names and INDEX not in names:
        raise InputError(
            f"{_shown(folder)}: a PEFT adapter (adapter_config.json), not a whole model; here a whole one is needed"
        )
    if index and SINGLE in names:
        if prefer is None:
            raise AmbiguousModel(
                f"{_shown(folder)}: holds both {SINGLE} and {index}, and one of them is stale. Delete it, or choose: "
                "prefer 'single' or 'sharded'"
            )
        index = index if prefer == "sharded" else None
    if index:
        return _from_index(folder, folder / index, allow_pickle)
    loose = [n for n in names if n.endswith(".safetensors")]
    if single:
        _require_regular(folder / single)
        return Source(folder, folder, (folder / single,), None)
    if loose:
        raise AmbiguousModel(
            f"{_shown(folder)}: several .safetensors files without an index: {name_list(loose)}. Name one file, or add "
            f"{INDEX}"
        )
    if PICKLE_INDEX in names:
        return _from_index(folder, folder / PICKLE_INDEX, allow_pickle)
    if PICKLE_SINGLE in names:
        _require_pickle_allowed([folder / PICKLE_SINGLE], allow_pickle)
        return Source(folder, folder, (folder / PICKLE_SINGLE,), None, pickled=True)
    raise InputError(
        f"{_shown(folder)}: no weights here (looked for {SINGLE}, {INDEX}, {PICKLE_SINGLE}); found: "
        f"{name_list(names) or 'nothing'}"
    )


def _standard_or_only(names: list[str], standard: str, suffix: str) -> str | None:
    if standard in names:
        return standard
    others = [n for n in names if n.endswith(suffix)]
    return others[0] if len(others) == 1 else None


def _from_index(path: Path, index: Path, allow_pickle: bool) -> Source:
    weight_map = read_weight_map(index)
    pickled = ".bin." in index.name
    folder = index.parent
    shards = list(dict.fromkeys(weight_map.values()))
    for shard in shards:
        check_relative(shard, _shown(index))
    if pickled:
        _require_pickle_allowed([folder / s for s in shards], allow_pickle)
    wrong = [s for s in shards if s.endswith(".safetensors") == pickled or (pickled and not s.endswith(PICKLED))]
    if wrong:
        kind = ".bin" if pickled else ".safetensors"
        raise UnsafeFile(
            f"{_shown(index)}: an index of {kind} shards must not point to another kind of file: {name_list(wrong)}"
        )
    missing = [s for s in shards if not (folder / s).exists()]
    if missing:
        raise InputError(
            f"{_shown(index)}: {len(missing)} of {len(shards)} shards are missing: {name_list(missing, 50)}. Download "
            "them again"
        )
    for shard in shards:
        _require_regular(folder / shard)
    return Source(path, folder, tuple(folder / s for s in sorted(shards)), weight_map, pickled)


def read_weight_map(index: Path) -> dict[str, str]:
    """`weight_map` of an index file: tensor name -> file name, checked to be text -> text."""
    table = read_json_object(index, MAX_INDEX)
    weight_map = table.get("weight_map")
    if type(weight_map) is not dict or not all(type(v) is str for v in weight_map.values()):
        raise CorruptFile(f"{_shown(index)}: expected a weight_map from tensor names to file names")
    return weight_map


def read_json_object(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes."""
    table = parse_json_file(path, limit)
    if type(table) is not dict:
        raise CorruptFile(f"{_shown(path)}: expected a JSON object")
    return table


def parse_json_file(path: Path, limit: int) -> Any:
    """JSON from a file of at most `limit` bytes; CorruptFile where it is damaged."""
    _require_regular(path)
    try:
        with open(path, "rb") as f:
            raw = f.read(limit + 1)
    except OSError as e:
        raise InputError(f"{_shown(path)}: cannot be read: {e.strerror}") from e
    if len(raw) > limit:
        raise CorruptFile(f"{_shown(path)}: longer than {limit} bytes")
    if raw.startswith(b"version https://git-lfs"):
        raise CorruptFile(f"{_shown(path)}: this is a git-lfs pointer, not the file: run git lfs pull")
    return parse_json(raw, _shown(path))


def write_index(folder: Path, layout: Layout) -> None:
    """model.safetensors.index.json, or that of each component, for the shards in `folder`; nothing for one shard."""
    for file, index in layout.indexes().items():
        (folder / file).write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_relative(name: str, where: str) -> None:
    """Refuse a file name that could leave its folder on any system. It is the text that is checked: that a file in the
    folder is itself a link to elsewhere is normal (downloads from the Hugging Face Hub are links into a cache of
    blobs)."""
    parts = name.split("/")
    if (
        not name.isprintable()
        or "\\" in name
        or ":" in name
        or name.startswith("/")
        or any(p in ("", ".", "..") for p in parts)
    ):
        raise UnsafePath(
            f"{where}: refers to {safe_name(name)!r}, which is not a plain file name inside the model's folder"
        )


def check_index(source: Source, held: Mapping[Path, list[str]]) -> None:
    """The index and the shards must say the same. `held`: file -> names of the tensors in it."""
    if source.weight_map is None:
        return
    absent, extra = [], []
    place = {source.folder / file: file for file in source.weight_map.values()} if source.folder else {}
    names_in = {place[path]: set(names) for path, names in held.items()}
    for name, file in source.weight_map.items():
        if name not in names_in[file]:
            absent.append(f"{safe_name(name)} (promised in {safe_name(file)})")
    for path, names in held.items():
        file = place[path]
        extra += [f"{safe_name(n)} (in {safe_name(file)})" for n in names if source.weight_map.get(n) != file]
    if absent or extra:
        raise InconsistentIndex(
            f"{_shown(source.path)}: the index and the shards disagree. Promised but absent ({len(absent)}): "
            f"{name_list(absent) or 'none'}. "
            f"Present but not in the index ({len(extra)}): {name_list(extra) or 'none'}"
        )


def _require_pickle_allowed(files: list[Path], allow_pickle: bool) -> None:
    if is_remote(files[0]):
        raise UnsafeFile(
            f"{_shown(files[0])}: pickled weights are read from local files only: their pickle is checked as a whole. "
            "Use the model's .safetensors files, or copy it to a local folder first"
        )
    if not allow_pickle:
        raise UnsafeFile(
            f"{_shown(files[0])}: pickled weights can run code when loaded. Use the model's .safetensors files, or "
            "allow pickles for this merge "
            "(--allow-pickle, allow_pickle=True): they are then read by a loader that builds tensors only"
        )


def _require_regular(path: Path) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError as e:
        raise InputError(f"{_shown(path)}: cannot be read: {e.strerror}") from e
    if not stat.S_ISREG(mode):
        raise InputError(f"{_shown(path)}: not a regular file")


def _absent(path: str) -> str:
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", path):
        return (
            f"{safe_name(path, 400)}: no such folder. If it is a Hugging Face id: pymerge reads local folders and "
            "downloads nothing; "
            f"fetch it first: hf download {path.split('@')[0]} --local-dir {path.split('@')[0].split('/')[1]}"
        )
    if is_collapsed(path):
        return f"{safe_name(path, 400)}: a URL; here a local path is needed: name it in a recipe, or copy it first"
    return f"{safe_name(path, 400)}: no such file or folder"


def _shown(path: Path) -> str:
    return safe_name(shown(path), 400)
