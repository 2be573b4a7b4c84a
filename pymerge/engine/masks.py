"""The masks and scales of the tasks beside a model merged by EMR: one more pass over the inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from pymerge.checkpoint import ITEMSIZE
from pymerge.checkpoint.side_tensors import SideTensors
from pymerge.engine.generic import DTYPES, purified_parts
from pymerge.engine.plan import Item, Plan
from pymerge.methods.base import TaskGroup
from pymerge.methods.emr import Emr, TaskMasks, task_masks
from pymerge.recipe import Steps

MASKS = "emr_masks.safetensors"
SCALES = "emr.scales"  # the tensor with a scale for each task, float64
CHUNK = 1 << 20  # entries read at once; all of a tensor where a purify step must see it


def write_masks(
    folder: Path, plan: Plan, steps_of: Callable[[Item], Steps], metadata: Mapping[str, str]
) -> dict[str, int]:
    """Writes the masks of all tensors merged by EMR into the folder. Returns the checksum of each file written.

    steps_of  the steps that an item was merged by, their questions answered
    metadata  of the file: the models' names

    Memory   T + 1 tensors of CHUNK entries; with purify steps what the plan says of the largest tensor"""
    items = [i for i in plan.items if i.mode == "generic" and i.entry.steps and isinstance(i.entry.steps.combine, Emr)]
    if not items:
        return {}
    tasks = len(items[0].entry.tuned)
    entries = [(i.entry.name, "U8", (tasks, -(-i.count // 8))) for i in items]
    deltas, used = ([[] for _ in range(tasks)] for _ in range(2))
    with SideTensors(folder / MASKS, [(SCALES, "F64", (tasks,)), *entries], metadata) as file:
        for item in items:
            sums = write_item(file, plan, item, steps_of(item))
            for t in range(tasks):
                deltas[t].append(sums[0][t] / max(1, item.count))
                used[t].append(sums[1][t] / max(1, item.count))
        scales = [math.fsum(d) / math.fsum(u) if math.fsum(u) else 0.0 for d, u in zip(deltas, used, strict=True)]
        file.write(SCALES, 0, torch.tensor(scales, dtype=torch.float64).view(torch.uint8).numpy().data)
    return {MASKS: file.checksum}


def write_item(file: SideTensors, plan: Plan, item: Item, steps: Steps) -> tuple[list[float], list[float]]:
    """Writes the masks of one tensor; returns the sums of |D_t| and of |E M_t| of each task."""
    tasks, row = len(item.entry.tuned), -(-item.count // 8)
    deltas, used = ([[] for _ in range(tasks)] for _ in range(2))
    at = 0
    for masks in masks_of(plan, item, steps):
        for t in range(tasks):
            file.write(item.entry.name, t * row + at, masks.bits[t].numpy().data)
            deltas[t] += masks.deltas[t]
            used[t] += masks.used[t]
        at += masks.bits.shape[1]
    return [math.fsum(d) for d in deltas], [math.fsum(u) for u in used]


def masks_of(plan: Plan, item: Item, steps: Steps) -> Iterator[TaskMasks]:
    """The masks of a tensor's entries, block by block."""
    step = max(1, item.count) if steps.purify else CHUNK
    for first in range(0, item.count, step):
        count = min(step, item.count - first)
        shape = item.entry.merged_shape if steps.purify else (count,)
        tensors = []
        for tensor in item.inputs:
            values = torch.empty(count, dtype=DTYPES[tensor.dtype])
            tensor.read_into(values.view(torch.uint8).numpy().data, first * ITEMSIZE[tensor.dtype])
            tensors.append(values.reshape(shape))
        base, *tuned = tensors
        group = TaskGroup(
            info=item.entry.info(plan.recipe.seed),
            base=base,
            tuned=tuple(tuned),
            first=first,
            inputs=item.entry.inputs or None,
            transposed=item.entry.transposed,
        )
        seen = purified_parts(steps.purify, group, item.entry.split)
        yield from task_masks(replace(seen, first=0))
