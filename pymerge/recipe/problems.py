"""Collects everything that is wrong with a recipe, to say it in one error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pymerge.errors import RecipeError


class Problems:
    """A list of problems, each with the place where it was found, and of notes."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.found: list[str] = []
        self.notes: list[str] = []

    def add(self, where: str, what: str) -> None:
        line = f"{where}: {what}" if where else what
        if line not in self.found:
            self.found.append(line)

    def note(self, text: str) -> None:
        """Something without effect, which is no error: for the summary."""
        if text not in self.notes:
            self.notes.append(text)

    def unknown(self, where: str, name: object, known: Iterable[str], kind: str = "key") -> None:
        """An unknown name, with the nearest valid ones."""
        self.add(where, f"unknown {kind} {name!r}: {nearest(name, known)}")

    def raise_if_any(self) -> None:
        if not self.found:
            return
        if len(self.found) == 1:
            raise RecipeError(f"{self.source}: {self.found[0]}")
        lines = "\n".join(f"  - {line}" for line in self.found)
        raise RecipeError(f"{self.source}: {len(self.found)} problems\n{lines}")


def nearest(name: object, known: Iterable[str]) -> str:
    """What to write instead: the nearest valid names, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(str(name).lower().replace("-", "_"), known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known) or 'none'}"
