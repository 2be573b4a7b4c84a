"""Ids of special tokens in configs: they follow their token where it has another id in the merged vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pymerge.checkpoint.index import read_json_object
from pymerge.checkpoint.read import MAX_CONFIG
from pymerge.checkpoint.sidefiles import with_changes
from pymerge.vocabulary.tokenizers import Vocab


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


def rewrite_ids(path: Path, old: Vocab, new: Vocab) -> None:
    """The same in a JSON file, where it is there and an id moves."""
    if not path.is_file():
        return
    table = read_json_object(path, MAX_CONFIG)
    if changes := moved_ids(table, old, new):
        path.write_text(json.dumps(with_changes(table, changes), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
