"""What a recipe's reference to a model means: a path, a URL, a name on the Hub, with a revision, with an adapter on it.

Text that exists as a path is that path, whatever characters it has; else `model@revision+adapter@revision`, each part a
path, a URL (then without `@revision`) or a name on the Hugging Face Hub.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from pymerge import hub
from pymerge.errors import InputError, RecipeError
from pymerge.recipe.problems import Problems
from pymerge.remote.mirror import local_of
from pymerge.remote.urls import is_collapsed, is_url

KEYS_OF_REFERENCE = ("model", "lora", "override_architecture", "path", "revision")
NONE: Mapping[str, str] = {}
_named: ContextVar[Mapping[str, str]] = ContextVar("named_models", default=NONE)


@contextmanager
def named_models(folders: Mapping[str, str]) -> Iterator[None]:
    """Inside this block these names mean these folders, before any path of that name."""
    token = _named.set(folders)
    try:
        yield
    finally:
        _named.reset(token)


def split_adapter(path: str) -> tuple[str, str] | None:
    """(base, adapter) of `base+adapter`, where that is no path itself and both parts are; else None."""
    if os.path.exists(path):
        return None
    return next((parts for parts in _cuts(path) if all(os.path.exists(part) for part in parts)), None)


def _cuts(text: str) -> list[tuple[str, str]]:
    return [(text[:i], text[i + 1 :]) for i, letter in enumerate(text) if letter == "+"]


def refuse_base(base: Any, models: Sequence[Any], what: str) -> None:
    """RecipeError where a model is the base itself: there is nothing to `what` then."""
    for model in models:
        paths = isinstance(base, str | os.PathLike) and isinstance(model, str | os.PathLike)
        if model is base or (paths and os.path.realpath(model) == os.path.realpath(base)):
            shown = os.fspath(model) if paths else "a model"
            raise RecipeError(f"{shown}: is the base itself: there is nothing to {what}")


def names_in(text: str) -> list[str]:
    """The names of `named_models` that a reference is of: the model's, the adapter's."""
    known = _named.get()
    return [name for part in _parts(text) for name in (part, part.partition("@")[0]) if name in known]


def parse_reference(raw: Any, where: str, problems: Problems, *, must_exist: bool) -> tuple[str, str] | None:
    """(reference as text, the local path or `base+adapter` that it means); None where it is no reference.

    raw  text, or mergekit's {model: {path, revision}, lora: ..., override_architecture}
    """
    if isinstance(raw, os.PathLike):
        raw = os.fspath(raw)
    if isinstance(raw, dict):
        raw = _text_of(raw, where, problems)
        if raw is None:
            return None
    if not isinstance(raw, str) or not raw or "\0" in raw:
        problems.add(where, f"must be the path of a model, got {raw!r}")
        return None
    if not must_exist:
        return raw, raw
    if not names_in(raw) and (os.path.exists(raw) or split_adapter(raw) is not None):
        return raw, raw
    found = [_folder(part, raw, where, problems) for part in _parts(raw)]
    return raw, raw if None in found else "+".join(part for part in found if part is not None)


def _parts(text: str) -> tuple[str, ...]:
    """The model, and the adapter where there is one: cut where most of both is known, else at the first plus. A URL is
    cut only in front of what is known, since it may have a plus of its own."""
    if _is_known(text):
        return (text,)
    cuts = [parts for parts in _cuts(text) if not is_url(text) or _is_known(parts[1]) or is_url(parts[1])]
    return max(cuts, key=lambda parts: sum(_is_known(part) or is_url(part) for part in parts), default=(text,))


def _is_known(part: str) -> bool:
    return part in _named.get() or os.path.exists(part)


def _folder(part: str, raw: str, where: str, problems: Problems) -> str | None:
    """Where one model is; what is wrong is a problem."""
    if _is_known(part):
        return _named.get().get(part, part)
    what = raw if part == raw else f"{raw}: {part}"
    if is_url(part):
        return _of_url(part, where, problems)
    name, at, revision = part.partition("@")
    if at and _is_known(name):
        text = f"{name} is a folder here, which has no revisions: give the folder that holds {revision!r}"
        problems.add(where, f"{what}: {text}")
    elif part.endswith("://"):
        problems.add(where, f"{what}: names no bucket or path")
    elif is_collapsed(part):
        problems.add(where, f"{what}: a URL that pathlib has taken a slash of: give it as text, s3://...")
    elif not hub.is_name(name) or (at and not revision):
        problems.add(where, f"{what}: no such file or folder (paths start from {os.getcwd()})")
    else:
        try:
            return hub.snapshot(name, revision or None)
        except InputError as e:
            problems.add(where, f"{what}: {e} (paths start from {os.getcwd()})")
    return None


def _of_url(url: str, where: str, problems: Problems) -> str | None:
    """The local path that a URL stands for; what is wrong is a problem."""
    try:
        path = local_of(url)
    except InputError as e:
        problems.add(where, str(e))
        return None
    if not os.path.exists(path):
        problems.add(where, f"{url}: no such file or folder")
        return None
    return path


def _text_of(raw: dict[Any, Any], where: str, problems: Problems) -> str | None:
    """mergekit's mapping as text."""
    for key in raw:
        if key not in KEYS_OF_REFERENCE:
            problems.unknown(where, key, KEYS_OF_REFERENCE)
    if raw.get("override_architecture") is not None:
        problems.note(f"{where}: override_architecture has no effect: models are merged by the names of their tensors")
    of_model = {key: raw[key] for key in ("path", "revision") if key in raw}
    parts = [_part_of(raw.get("model", of_model), where, problems)]
    if raw.get("lora") is not None:
        parts.append(_part_of(raw["lora"], f"{where}: lora", problems))
    return None if None in parts else "+".join(part for part in parts if part is not None)


def _part_of(raw: Any, where: str, problems: Problems) -> str | None:
    if not isinstance(raw, dict):
        raw = {"path": raw}
    for key in raw:
        if key not in ("path", "revision"):
            problems.unknown(where, key, ("path", "revision"))
    path, revision = raw.get("path"), raw.get("revision")
    if not isinstance(path, str) or not path or not isinstance(revision, str | None):
        problems.add(where, f"must be {{path: TEXT, revision: TEXT}}, got {raw!r}")
        return None
    return path if revision is None else f"{path}@{revision}"
