"""Tokenizers of model folders: loaded without their code, joined, saved. transformers is imported here, on use."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pymerge.checkpoint import safe_name
from pymerge.checkpoint.index import read_json_object
from pymerge.checkpoint.read import MAX_CONFIG
from pymerge.checkpoint.sidefiles import TOKENIZER
from pymerge.errors import CorruptFile, InputError

MAX_FILE = 200_000_000  # bytes of one tokenizer file: 256k tokens take 35 MB
MAX_TOKENS = 1 << 24
Vocab = dict[str, int]  # token -> id


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a folder. Nothing in the folder is run, nothing is downloaded.

    Raises   InputError, CorruptFile: no tokenizer there, one that needs code of its own or is not fast, files beyond
             the limits or damaged"""
    check_files(folder)
    label = safe_name(str(folder))
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise InputError(
            'the tokenizer keys of a recipe need transformers; install with: pip install "pymerge[hf]"'
        ) from None
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_fast=True)
    except BaseException as error:  # the library's own panics are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        reason = safe_name(next(iter(str(error).splitlines()), type(error).__name__), 300)
        raise InputError(f"{label}: no tokenizer can be loaded from this folder: {reason}") from None
    if not found.is_fast:
        raise InputError(
            f"{label}: its tokenizer is a slow one ({type(found).__name__}), whose tokens cannot be joined or added "
            "reliably: convert it to tokenizer.json (save_pretrained of the fast class)"
        )
    return found


def tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in sorted(os.listdir(folder)) if any(fnmatchcase(name, p) for p in TOKENIZER)]


def check_files(folder: Path) -> None:
    for path in tokenizer_files(folder):
        if not path.is_file():
            raise InputError(f"{path}: not a regular file")
        size = path.stat().st_size
        limit = MAX_FILE if path.name not in ("tokenizer_config.json", "special_tokens_map.json") else MAX_CONFIG
        if size > limit:
            raise CorruptFile(f"{path}: {size} bytes, more than the {limit} that a tokenizer file may have")
        if size < 1000 and path.read_bytes().startswith(b"version https://git-lfs"):
            raise CorruptFile(f"{path}: this is a git-lfs pointer, not the file: run git lfs pull")


def files_digest(folders: Iterable[Path]) -> str:
    """Of the tokenizer files in these folders, with their names."""
    digest = hashlib.blake2b(digest_size=16)
    for folder in folders:
        for path in tokenizer_files(folder):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def tokens_of(tokenizer: Any, label: str) -> Vocab:
    """Token -> id, in the order of ids."""
    vocab: Vocab = tokenizer.get_vocab()
    if len(vocab) > MAX_TOKENS or not vocab:
        raise InputError(f"{label}: its tokenizer has {len(vocab)} tokens")
    return dict(sorted(vocab.items(), key=lambda item: item[1]))


def joined(base: Any, others: Sequence[tuple[Any, Vocab]]) -> Any:
    """`base`, changed: with the tokens that it lacks added behind its own.

    First the plain ones of all `others` (tokenizer, tokens), then those that these have as added tokens, with their
    settings, which plain ones of `base` get too; each in the order of the models and of their ids. A token that
    several added is as the first has it."""
    known = set(base.get_vocab())
    own = {token.content for token in base.added_tokens_decoder.values()}
    added: dict[str, Any] = {}
    for tokenizer, _ in others:
        for token in tokenizer.added_tokens_decoder.values():
            added.setdefault(token.content, token)
    plain = [token for _, vocab in others for token in vocab if token not in known and token not in added]
    base.add_tokens(list(dict.fromkeys(plain)))
    base.add_tokens([token for content, token in added.items() if content not in own])
    return base


def check_without_holes(vocab: Vocab, label: str) -> None:
    if list(vocab.values()) != list(range(len(vocab))):
        last = max(vocab.values())
        raise InputError(
            f"{label}: {len(vocab)} tokens with ids up to {last}: ids that no token has, or several have, leave open "
            "which rows the merged model gets. Repair the tokenizer, or leave the tokenizer keys out of the recipe"
        )


def special_ids(tokenizer: Any) -> dict[str, int]:
    """`eos_token_id` and so on, of those that it has."""
    names = [f"{kind}_token_id" for kind in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")]
    return {name: number for name in names if (number := getattr(tokenizer, name, None)) is not None}


def saved(tokenizer: Any, template: str | None, label: str) -> dict[str, bytes]:
    """The tokenizer's files by their names, with a chat template where one is given."""
    if template is not None:
        tokenizer.chat_template = template
    loading = ("local_files_only", "is_local")  # how it was loaded is no part of it
    tokenizer.init_kwargs = {key: value for key, value in tokenizer.init_kwargs.items() if key not in loading}
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except (OSError, TypeError, ValueError) as error:
            raise InputError(f"{label}: its tokenizer cannot be saved: {safe_name(str(error), 300)}") from None
        found = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def with_template_files(folder: Path | None, template: str) -> dict[str, bytes]:
    """The files of a tokenizer that become other ones where it gets this chat template and stays as it is."""
    files = {"chat_template.jinja": template.encode("utf-8", "surrogatepass")}
    path = folder / "tokenizer_config.json" if folder is not None else None
    if path is not None and path.is_file():
        table = read_json_object(path, MAX_CONFIG)
        if table.pop("chat_template", None) is not None:
            files[path.name] = json_bytes(table)
    return files


def json_bytes(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
