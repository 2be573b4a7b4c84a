"""The journal of a merge in progress: which bytes of the output are on disk, with their checksums.

Text, one record a line: CRC-32C of the rest in 8 hex digits, a space, JSON. The first record is the identity of the
merge (recipe, version, inputs, layout); each further one vouches for a segment of a tensor: {"t": name, "o": first
byte, "n": bytes, "c": crc, "f": facts for the summary, if any}. A record is appended only after the bytes it vouches
for are on disk, so a torn last line costs nothing but the work it stood for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pymerge import _C

JOURNAL = "journal"


class Segment(NamedTuple):
    """Bytes start .. start + nbytes of a tensor, with their CRC-32C, and what the summary shall say of them."""

    name: str
    start: int
    nbytes: int
    crc: int
    facts: Mapping[str, Any] = {}

    @property
    def record(self) -> dict[str, Any]:
        facts = {"f": dict(self.facts)} if self.facts else {}
        return {"t": self.name, "o": self.start, "n": self.nbytes, "c": self.crc} | facts


class Journal:
    """The open journal of one staging folder. Its methods raise OSError."""

    def __init__(self, path: Path, *, create_for: dict[str, Any] | None = None) -> None:
        """Opens the journal at `path` for appending; with `create_for`, makes it anew with that identity."""
        self._path = path
        if create_for is None:
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        else:
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._append(_line({"pymerge_journal": 1, "identity": create_for}))

    def append(self, segments: list[Segment]) -> None:
        """Vouch for segments whose bytes are on disk already."""
        self._append(b"".join(_line(s.record) for s in segments))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, data: bytes) -> None:
        done = 0
        while done < len(data):
            done += os.write(self._fd, data[done:])
        os.fsync(self._fd)


def read_journal(path: Path) -> tuple[dict[str, Any] | None, list[Segment]]:
    """Identity and segments of a journal. Reading stops at the first damaged line, normally a torn last one.

    Returns  (None, []) where there is no journal or not even its first line is whole."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn
    except FileNotFoundError:
        return None, []
    records = []
    for line in lines:
        record = _record(line)
        if record is None or (records and not _is_segment(record)):
            break
        records.append(record)
    if not records or records[0].get("pymerge_journal") != 1 or not isinstance(records[0].get("identity"), dict):
        return None, []
    segments: dict[str, list[Segment]] = {}
    for r in records[1:]:
        new = Segment(r["t"], r["o"], r["n"], r["c"], r.get("f", {}))
        kept = [
            s
            for s in segments.get(new.name, [])
            if s.start >= new.start + new.nbytes or new.start >= s.start + s.nbytes
        ]
        segments[new.name] = [*kept, new]  # bytes written again are vouched for by the later line
    return records[0]["identity"], [s for found in segments.values() for s in found]


def read_identity(path: Path) -> dict[str, Any] | None:
    """The identity of a journal; None where there is none. Raises OSError."""
    with open(path, "rb") as file:
        record = _record(file.readline().removesuffix(b"\n"))
    return record.get("identity") if record is not None else None


def rewrite_journal(path: Path, identity: dict[str, Any], segments: list[Segment]) -> None:
    """Replace the journal by one that vouches for `segments` only, in one step."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    journal = Journal(fresh, create_for=identity)
    if segments:
        journal.append(segments)
    journal.close()
    os.replace(fresh, path)


def normal_form(identity: dict[str, Any]) -> dict[str, Any]:
    """The identity as it comes back from JSON, so that a tuple and a list compare equal."""
    return json.loads(json.dumps(identity, sort_keys=True))


def differences(old: Any, new: Any, at: str = "") -> list[str]:
    """Where two identities differ, as `place: was X, is now Y` lines."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        if _is_checkpoint(old) and _is_checkpoint(new):
            if old["path"] != new["path"]:
                return [f"{at}: was {_short(old['path'])}, is now {_short(new['path'])}"]
            files = _changed_files(old, new)
            rest, now = ({k: v for k, v in given.items() if k != "files"} for given in (old, new))
            return [*files, *differences(rest, now, at)]
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{at}.{k}" if at else str(k))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in differences(a, b, f"{at}[{i}]")]
    return [f"{at}: was {_short(old)}, is now {_short(new)}"]


def _is_checkpoint(found: dict[str, Any]) -> bool:
    """Whether this is a `Checkpoint.fingerprint`. Journals may hold anything."""
    files = found.get("files")
    lists = isinstance(files, list) and all(isinstance(file, list) and len(file) == 4 for file in files)
    return "path" in found and lists and all(isinstance(file[0], str) for file in files or ())


def _changed_files(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line a file of a checkpoint that is another one now."""
    before, now = ({name: facts for name, *facts in given["files"]} for given in (old, new))
    lines = []
    for name in [*before, *(n for n in now if n not in before)]:
        if name not in now or name not in before:
            lines.append(f"{old['path']}: {name} {'is new' if name in now else 'is gone'}")
        elif before[name] != now[name]:
            named = zip(("size", "time of change", "header"), before[name], now[name], strict=True)
            lines.append(f"{old['path']}: {name} has changed ({', '.join(what for what, a, b in named if a != b)})")
    return lines


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":"), sort_keys=True).encode("ascii")
    return b"%08x %s\n" % (_C.crc32c(text), text)


def _record(line: bytes) -> dict[str, Any] | None:
    text = line[9:]
    if line[8:9] != b" " or line[:8] != b"%08x" % _C.crc32c(text):
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _is_segment(record: dict[str, Any]) -> bool:
    numbers = [record.get(key) for key in ("o", "n", "c")]
    plain = all(type(number) is int and number >= 0 for number in numbers)
    return plain and isinstance(record.get("t"), str) and isinstance(record.get("f", {}), dict)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
