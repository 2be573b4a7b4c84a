"""A part of an item, loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pymerge import _C
from pymerge.checkpoint import ITEMSIZE
from pymerge.engine.pipeline import Segment
from pymerge.engine.plan import Item
from pymerge.engine.survey import Tile
from pymerge.ops.delta_rule import DeltaRule

IDENTITY = DeltaRule(weights=(1.0,))  # copies one tensor, changing its dtype


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A range of an item, loaded: where its inputs and its output are in memory."""

    item: Item
    first: int
    count: int
    inputs: tuple[tuple[int, str], ...]  # (address, dtype), base first
    input_views: tuple[memoryview, ...]
    out: tuple[int, str]
    out_view: memoryview
    number: int = 0

    def part(self, first: int, count: int) -> Piece:
        """The piece cut down to a range of the item's entries."""
        skip = first - self.first
        inputs = tuple(
            (a + skip * ITEMSIZE[t.dtype], d) for (a, d), t in zip(self.inputs, self.item.inputs, strict=True)
        )
        start = skip * self.item.out_width
        view = self.out_view[start : start + count * self.item.out_width]
        return replace(
            self, first=first, count=count, inputs=inputs, out=(self.out[0] + start, self.out[1]), out_view=view
        )

    @property
    def tile(self) -> Tile:
        has_base = self.item.mode != "copy" and self.item.entry.base is not None
        return Tile(
            base=self.inputs[0] if has_base else None,
            tuned=list(self.inputs[1:] if has_base else self.inputs),
            count=self.count,
            index0=self.first,
            number=self.number,
            rule=self.item.rule or IDENTITY,
        )

    def merge_into(self, out: tuple[int, str], params: _C.DeltaParams) -> list[int]:
        """Merges by an answered rule; counts of entries that are not finite, as `_C.delta_merge` returns them."""
        tile, entry = self.tile, self.item.entry
        subtracted, added = (tile.base if used else None for used in (entry.subtracts, entry.adds))
        return _C.delta_merge(subtracted, tile.tuned, added, out, self.count, self.first, params)


def segment_of(piece: Piece, facts: Mapping[str, Any] | None = None) -> Segment:
    """The piece's finished output."""
    width = piece.item.out_width
    crc = _C.crc32c((piece.out[0], piece.count * width))
    return Segment(piece.item.entry.name, piece.first * width, piece.out_view, crc, facts or {})


def segments_of(pieces: Sequence[Piece], facts: Mapping[str, Any]) -> list[Segment]:
    """Likewise of pieces that are merged as one, with what the steps note."""
    return [segment_of(piece, facts if piece is pieces[0] else {}) for piece in pieces]
