"""Matrices that are merged as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pymerge.engine.devices import HOST
from pymerge.methods.base import TensorInfo

if TYPE_CHECKING:
    from pymerge.engine.plan import Item, Planner


def joined(planner: Planner, items: Sequence[Item]) -> list[Item]:
    """Matrices that are merged as one moved together, in the order of the recipe; the first carries the workspace of
    all."""
    groups: dict[int, list[Item]] = {}
    for item in items:
        if item.entry.join is not None:
            groups.setdefault(item.entry.join[0], []).append(item)
    ordered: list[Item] = []
    for item in items:
        if item.entry.join is None:
            ordered.append(item)
        elif groups[item.entry.join[0]][0] is item:
            ordered += one_matrix(planner, groups[item.entry.join[0]])
    return ordered


def one_matrix(planner: Planner, items: Sequence[Item]) -> list[Item]:
    first, *others = sorted(items, key=lambda item: item.entry.join or ())
    shape = (sum(item.entry.shape[0] for item in items), first.entry.shape[1])
    info = TensorInfo(name=first.entry.name, shape=shape, tasks=len(first.entry.tuned))
    assert first.entry.steps is not None
    workspace = planner.workspace(first.entry.steps, info) + sum(item.read_bytes for item in items)
    members = [replace(first, workspace=workspace), *(replace(item, workspace=0) for item in others)]
    if len({item.device for item in members}) > 1 or (planner.host and planner.taken(members) > 1):
        members = [replace(item, device=HOST) for item in members]
    return planner.fitting(members, f"{first.entry.name}, joined")
