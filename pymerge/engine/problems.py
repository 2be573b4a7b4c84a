"""Everything that is wrong with the inputs of a merge, said in one error."""

from __future__ import annotations

from dataclasses import dataclass, field

from pymerge.errors import InputError, MergeError


@dataclass
class Problems:
    """Collects what is wrong, raises it as one error."""

    found: list[tuple[type[MergeError], str]] = field(default_factory=list)

    def add(self, kind: type[MergeError], message: str) -> None:
        self.found.append((kind, message))

    def raise_all(self) -> None:
        if not self.found:
            return
        kinds = {kind for kind, _ in self.found}
        kind = self.found[0][0] if len(kinds) == 1 else InputError
        shown = [message for _, message in self.found[:20]]
        if len(self.found) > 20:
            shown.append(f"... and {len(self.found) - 20} more")
        raise kind("\n".join(shown))
