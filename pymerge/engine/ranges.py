"""How the items of a plan are cut into what is read at once and what is computed at once."""

from __future__ import annotations

from collections.abc import Iterator

from pymerge.engine.plan import BATCH, Item


def tiles(item: Item, first: int, count: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the tiles of a range; tile borders are multiples of the tile size from the item's start."""
    for start in range(first, first + count, item.tile):
        yield start, min(item.tile, first + count - start)


def batches(todo: Iterator[tuple[Item, int, int] | None]) -> Iterator[list[tuple[Item, int, int]]]:
    """Small consecutive ranges together, matrices that are merged as one together, all others alone; nothing together
    across a None."""
    batch: list[tuple[Item, int, int]] = []
    size, kind = 0, None
    for found in todo:
        if found is None:
            if batch:
                yield batch
            batch, size, kind = [], 0, None
            continue
        item, first, count = found
        more = item.block_bytes(count)
        alone = item.mode in ("swept", "generic") or more > BATCH
        new = ("join", item.entry.join[0]) if item.entry.join is not None else None if alone else ("small", None)
        if batch and (new != kind or (kind == ("small", None) and size + more > BATCH)):
            yield batch
            batch, size = [], 0
        kind = new
        if kind is None:
            yield [(item, first, count)]
        else:
            batch.append((item, first, count))
            size += more
    if batch:
        yield batch
