"""search.json: every try as soon as it is known, so that an interrupted search goes on where it was."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pymerge.checkpoint.journal import differences, normal_form
from pymerge.errors import OutputError
from pymerge.version import __version__

FORMAT = 1
FILE = "search.json"
OURS = (f"{FILE}*", "curve.png", "update-*", "try-*")

How = Literal["scaled", "merged"]


@dataclass(frozen=True, kw_only=True)
class Try:
    """One value and what it scored.

    number  from 1, in the order of trying
    score   the mean over tasks, or the number that the evaluation gave
    tasks   score by task; {} where the evaluation gave one number
    how     scaled: the update, merged once, times the scale; merged: a merge of its own
    """

    number: int
    values: Mapping[str, float]
    score: float
    tasks: Mapping[str, float]
    how: How
    merge_seconds: float
    evaluate_seconds: float


@dataclass
class Record:
    """The state of a search in its work folder.

    identity  what a score depends on beside the values
    updates   seconds of each update that was merged for several scales, with the recipe's digest
    failure   why the last run stopped, with the traceback
    """

    folder: Path
    identity: dict[str, Any]
    tries: list[Try] = field(default_factory=list)
    updates: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""

    def of(self, values: Mapping[str, float]) -> Try | None:
        return next((one for one in self.tries if one.values == values), None)

    def best(self, minimize: bool) -> Try | None:
        """The first of the best."""
        if not self.tries:
            return None
        return (min if minimize else max)(self.tries, key=lambda one: one.score)

    def save(self, **more: Any) -> None:
        """Replaces the file in one step; more: goes into it."""
        plain = {
            "format": FORMAT,
            "pymerge": __version__,
            "identity": self.identity,
            "tries": [asdict(one) for one in self.tries],
            "updates": self.updates,
            "failure": self.failure,
        }
        write_json(self.folder / FILE, plain | more)

    def clear(self, pattern: str, keep: str = "") -> None:
        """Deletes what matches in the work folder, but for names that begin with `keep`."""
        for path in self.folder.glob(pattern):
            if not (keep and path.name.startswith(keep)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def own_name(folder: Path, path: Path) -> bool:
    """Whether a path lies where a search in `folder` keeps, and deletes, its own files."""
    folder, path = folder.resolve(), path.resolve()
    if folder not in path.parents:
        return False
    return any(fnmatchcase(path.relative_to(folder).parts[0], pattern) for pattern in OURS)


@contextlib.contextmanager
def opened(folder: Path, identity: dict[str, Any], *, restart: bool) -> Iterator[Record]:
    """The record in `folder`, which nobody else may use meanwhile: continued, or new.

    Raises   OutputError: another search is in the folder (it says in what they differ), other files are, or another
             process works there."""
    if folder.is_dir() and os.listdir(folder) and not any(folder.glob(f"{FILE}*")):  # what is written first
        raise OutputError(f"{folder}: holds files that are not of a search: choose another --work folder")
    with locked(folder, "search", "choose another --work folder"):
        record = Record(folder, normal_form(identity))
        if restart:
            for pattern in OURS:
                record.clear(pattern)
        _read(record)
        record.save()
        yield record


@contextlib.contextmanager
def locked(folder: Path, what: str, otherwise: str) -> Iterator[None]:
    """The folder, made where there is none, for this process alone. OutputError where another one has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as e:
        raise OutputError(f"{folder}: is no folder that a {what} can write to ({e.strerror}): {otherwise}") from e
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{folder}: another {what} works there now: wait for it, or {otherwise}") from None
        yield
    finally:
        os.close(lock)


def write_json(path: Path, plain: Mapping[str, Any]) -> None:
    """Replaces the file in one step."""
    new = path.with_name(f"{path.name}.new")
    with open(new, "w") as file:
        json.dump(plain, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def changes_text(old: Any, new: Any) -> str:
    """Where two identities differ; "" where they do not."""
    changes = differences(old, new)
    more = f"; and {len(changes) - 5} more" if len(changes) > 5 else ""
    return "; ".join(changes[:5]) + more


def _read(record: Record) -> None:
    """Fills in what an earlier run of the same search has left."""
    path = record.folder / FILE
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text())
        tries = [Try(**one) for one in found["tries"]]
        identity, record.updates = found["identity"], found["updates"]
    except (ValueError, KeyError, TypeError) as e:
        raise OutputError(
            f"{path}: is no record of a search ({e}): --restart begins anew, or choose another --work"
        ) from e
    if changes := changes_text(identity, record.identity):
        raise OutputError(
            f"{path}: holds {len(tries)} tries of another search: {changes}. --restart begins anew, --work FOLDER "
            "keeps both"
        )
    record.tries = tries
