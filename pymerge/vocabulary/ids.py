"""Ids of special tokens in configs: they follow their token where it has another id in the merged vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.checkpoint.index import read_json_object
from pymerge.checkpoint.read import MAX_CONFIG
from pymerge.checkpoint.sidefiles import with_changes
from pymerge.vocabulary.tokenizers import Vocab, json_bytes

NAME = "generation_config.json"


@dataclass(frozen=True)
class Ids:
    """old, new: tokens of the model whose configs they are, and of the merged model; special: what the latter's
    tokenizer calls `eos_token_id` and so on."""

    old: Vocab
    new: Vocab
    special: Mapping[str, int]

    def moved(self, config: Mapping[str, Any] | None) -> dict[str, Any]:
        """Dotted key -> new value of what a config says in old ids: `eos_token_id` and its kin, lists of ids too. Where
        the token is gone, the tokenizer's own of that name; an id that no token has stays."""
        tokens = {number: token for token, number in self.old.items()}

        def moved(key: str, number: Any) -> Any:
            token = tokens.get(number) if isinstance(number, int) else None
            return number if token is None else self.new.get(token, self.special.get(key.rpartition(".")[2], number))

        changes = {}
        for key, value in id_entries(config or {}):
            many = isinstance(value, list)
            now = list(dict.fromkeys(moved(key, number) for number in value)) if many else moved(key, value)
            if now != value:
                changes[key] = now
        return changes

    def generation_config(self, folder: Path) -> dict[str, bytes]:
        """generation_config.json of a folder with moved ids; nothing where none moves."""
        path = folder / NAME
        if not path.is_file():
            return {}
        table = read_json_object(path, MAX_CONFIG)
        changes = self.moved(table)
        return {NAME: json_bytes(with_changes(table, changes))} if changes else {}


def id_entries(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in ("text_config", "language_config", "llm_config") and isinstance(value, Mapping):
            yield from id_entries(value, f"{prefix}{key}.")
        elif isinstance(key, str) and key.endswith(("_token_id", "_token_ids")) and "." not in key:
            yield f"{prefix}{key}", value
