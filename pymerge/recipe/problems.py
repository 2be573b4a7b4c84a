"""Collects everything that is wrong with a recipe, to say it in one error."""

from __future__ import annotations

from collections.abc import Iterable

from pymerge.errors import RecipeError
from pymerge.methods.names import nearest


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

    def useless(self, where: str, what: str) -> None:
        """Something given that can have no effect: an error here, a note where mergekit's leniency is asked for."""
        self.add(where, what)

    def unknown(self, where: str, name: object, known: Iterable[str], kind: str = "key") -> None:
        """An unknown name, with the nearest valid ones."""
        report = self.useless if kind in ("key", "hyperparameter") else self.add
        report(where, f"unknown {kind} {name!r}: {nearest(name, known)}")

    def raise_if_any(self) -> None:
        if not self.found:
            return
        if len(self.found) == 1:
            raise RecipeError(f"{self.source}: {self.found[0]}")
        lines = "\n".join(f"  - {line}" for line in self.found)
        raise RecipeError(f"{self.source}: {len(self.found)} problems\n{lines}")
