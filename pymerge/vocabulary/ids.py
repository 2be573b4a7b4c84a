"""Ids of special tokens in configs: they follow their token where it has another id in the merged vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pymerge.checkpoint.index import read_json_object
from pymerge.checkpoint.read import MAX_CONFIG
from pymerge.checkpoint.sidefiles import with_changes
from pymerge.vocabulary.tokenizers import Vocab, json_bytes

NAME = "generation_config.json"


def moved_ids(config: Mapping[str, Any] | None, old: Vocab, new: Vocab) -> dict[str, Any]:
    """Dotted key -> new value of what a config says in ids of `old`: `eos_token_id` and its kin, lists of ids too. An
    id whose token is not in `new`, or that no token has, stays."""
    token = {number: text for text, number in old.items()}

    def moved(number: Any) -> Any:
        return new.get(token.get(number, ""), number) if isinstance(number, int) else number

    changes = {}
    for key, value in id_entries(config or {}):
        now = [moved(number) for number in value] if isinstance(value, list) else moved(value)
        if now != value:
            changes[key] = now
    return changes


def id_entries(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in ("text_config", "language_config", "llm_config") and isinstance(value, Mapping):
            yield from id_entries(value, f"{prefix}{key}.")
        elif isinstance(key, str) and key.endswith(("_token_id", "_token_ids")) and "." not in key:
            yield f"{prefix}{key}", value


def generation_config(folder: Path | None, old: Vocab, new: Vocab) -> dict[str, bytes]:
    """generation_config.json of a folder with moved ids; nothing where none moves."""
    path = folder / NAME if folder is not None else None
    if path is None or not path.is_file():
        return {}
    table = read_json_object(path, MAX_CONFIG)
    changes = moved_ids(table, old, new)
    return {NAME: json_bytes(with_changes(table, changes))} if changes else {}
