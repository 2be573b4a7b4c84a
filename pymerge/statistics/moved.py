"""Statistics of a model whose units are put in another order: the moments of its layers' inputs follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pymerge.linalg.packed import pack, unpack
from pymerge.statistics.moments import Moments
from pymerge.statistics.store import KINDS, Statistics


@dataclass(frozen=True, kw_only=True)
class MovedStatistics(Statistics):
    """As `Statistics`, with entry i of a module's input being entry order(module)[i] of what was observed (None: i)."""

    order: Callable[[str], Tensor | None]

    def __getitem__(self, module: str) -> Moments:
        parts: dict[str, Any] = {kind: self.part(module, kind) for kind in KINDS}
        return Moments(rows=self.rows[self.header.modules[module]], **parts)

    def part(self, module: str, kind: str) -> Tensor | None:
        found, index = super().part(module, kind), self.order(module)
        if found is None or index is None:
            return found
        if kind != "triangle":
            return found[..., index]
        upper = unpack(found, len(index), found.dtype)
        return pack((upper + upper.triu(1).T)[index][:, index])
