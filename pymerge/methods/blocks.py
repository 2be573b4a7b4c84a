"""Entry-wise work in pieces that stay in the processor's cache: faster, and nearly no memory beside the tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pymerge.methods.base import TaskGroup

if TYPE_CHECKING:
    from torch import Tensor

BLOCK: Final = 1 << 17  # entries


def blocks(group: TaskGroup) -> Iterator[TaskGroup]:
    """The group's entries in order, BLOCK at a time, as one-dimensional tensors."""
    base = None if group.base is None else group.base.reshape(-1)
    tuned = [t.reshape(-1) for t in group.tuned]
    weights = None if group.weights is None else [t.reshape(-1) for t in group.weights]
    for start in range(0, len(tuned[0]), BLOCK):
        part = slice(start, start + BLOCK)
        yield replace(
            group,
            base=None if base is None else base[part],
            tuned=tuple(t[part] for t in tuned),
            weights=None if weights is None else tuple(w[part] for w in weights),
            first=group.first + start,
        )


def in_blocks(group: TaskGroup, merge: Callable[[TaskGroup], Tensor]) -> Tensor:
    """What `merge` makes of the group's blocks, in float32 and the group's shape."""
    import torch

    merged = torch.empty(group.tuned[0].shape, dtype=torch.float32, device=group.tuned[0].device)
    flat = merged.view(-1)
    for block in blocks(group):
        start = block.first - group.first
        flat[start : start + BLOCK] = merge(block)
    return merged
