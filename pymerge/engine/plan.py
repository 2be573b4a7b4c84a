"""The ordered list of what a merge reads, computes and writes, with bytes and memory, before anything is computed.

Tiles: element-wise work is cut into ranges of entries, so the memory floor does not depend on the largest tensor. A
rule that must look at the whole tensor first (TIES, SLERP, ...) holds the tensor if it fits into half of the arena and
sweeps over it in tiles otherwise.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NoReturn

from pymerge.checkpoint import ITEMSIZE, AnyTensor, Checkpoint, Layout, plan_layout
from pymerge.engine.check import Entry, check, tensor_counts
from pymerge.errors import RecipeError
from pymerge.methods.base import ElementWiseCombine, TensorInfo, chain_rule, merges_by_rule
from pymerge.ops.delta_rule import DeltaRule
from pymerge.recipe import Recipe, Steps

Mode = Literal["copy", "tiles", "held", "swept", "generic"]
TILE = 1 << 22  # entries of a tile where memory allows: 8 MiB of bfloat16, the block in which disks are fastest
SUM_BLOCK = 1 << 20  # partial sums are kept for blocks of this many entries: tiles of a sweep are multiples of it
BATCH = 8 << 20  # bytes: smaller tensors are read and computed together
SLACK = 48 << 20  # bytes that the program itself may still grow by while it merges: headers, histograms, stacks
SMALLEST_ARENA = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Item:
    """A range of one output tensor and how it is made."""

    entry: Entry
    mode: Mode
    first: int  # range of entries
    count: int
    tile: int  # entries computed and written at once
    rule: DeltaRule | None = None  # of element-wise merges, unanswered
    survey_scope: int | None = None  # number of the model-wide survey that answers the rule

    @property
    def read_bytes(self) -> int:
        return sum(self.input_bytes(self.count))

    def input_bytes(self, count: int) -> list[int]:
        """Bytes of `count` entries of each input, base first."""
        return [count * ITEMSIZE[t.dtype] for t in self.inputs]

    @property
    def inputs(self) -> tuple[AnyTensor, ...]:
        entry = self.entry
        if self.mode == "copy":
            return (entry.reference, *entry.equal_to)
        return ((entry.base,) if entry.base is not None else ()) + entry.tuned

    @property
    def out_width(self) -> int:
        return ITEMSIZE[self.entry.dtype]

    def block_bytes(self, count: int) -> int:
        """Arena bytes for the inputs and the output of `count` entries, with alignment."""
        return sum(-(-n // 4096) * 4096 for n in self.input_bytes(count)) + count * self.out_width + 3 * 4096

    @property
    def peak_bytes(self) -> int:
        """Memory while the item is worked on: a tile of it, or all of it."""
        whole = self.mode in ("held", "generic")
        return self.block_bytes(self.count if whole else min(self.tile, self.count))

    @property
    def flops(self) -> int:
        """Floating-point operations of the merge pass: subtract, weigh and add per task, add the base and scale.

        Surveys are comparisons and sums: about two a task and entry each. Spectral steps are not counted here."""
        if self.mode == "copy":
            return 0
        tasks, asked = len(self.entry.tuned), self.rule is not None and self.rule.needs_survey
        return self.count * (3 * tasks + 2 + (2 * tasks if asked else 0))

    @property
    def survey_reads(self) -> int:
        """How often the inputs are read again for the survey (swept items)."""
        if self.rule is None or (self.mode != "swept" and self.survey_scope is None):
            return 0
        kth = 2 * ((self.rule.top is not None) + (self.rule.skip is not None))
        return kth + (self.rule.gram_weights is not None) + (self.rule.rescale == "l1") + (self.rule.elect == "authors")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a merge is run: nothing here changes a byte of the result on one device."""

    memory: int | None = None  # bytes on top of what the process holds; None: a quarter of what is free, at most 8 GB
    threads: int | None = None  # compute threads; None: the processors this process may use
    device: str = "cpu"
    shard_bytes: int = 5_000_000_000
    overwrite: bool = False
    resume: bool = True
    allow_pickle: bool = False
    prefer: Literal["single", "sharded"] | None = None
    progress: bool | None = None  # None: where standard error is a terminal

    @property
    def memory_bytes(self) -> int:
        return self.memory if self.memory is not None else min(available_memory() // 4, 8_000_000_000)

    @property
    def thread_count(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))


def available_memory() -> int:
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4_000_000_000


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will happen, in order."""

    recipe: Recipe
    items: tuple[Item, ...]
    layout: Layout
    arena_bytes: int
    notes: list[str] = field(default_factory=list)
    surveys: tuple[tuple[Steps, tuple[Item, ...]], ...] = ()  # model-wide: the steps and the items they cover

    @property
    def read_bytes(self) -> int:
        return sum(item.read_bytes * (1 + item.survey_reads) for item in self.items)

    @property
    def write_bytes(self) -> int:
        return sum(item.count * item.out_width for item in self.items)

    @property
    def counts(self) -> dict[str, int]:
        entries = {id(item.entry): item.entry for item in self.items}
        return dict(tensor_counts(list(entries.values())))


def element_wise(steps: Steps) -> bool:
    return merges_by_rule(steps.purify, steps.combine) and not steps.calibrate


def survey_scope(steps: Steps) -> str:
    return steps.combine.survey_scope if isinstance(steps.combine, ElementWiseCombine) else "tensor"


class Planner:
    """Cuts checked entries into items under a memory budget."""

    def __init__(self, recipe: Recipe, options: Options) -> None:
        self.recipe, self.options = recipe, options
        self.arena_bytes = options.memory_bytes - SLACK
        if self.arena_bytes < SMALLEST_ARENA:
            self.refuse(SLACK + SMALLEST_ARENA, "a merge")

    def refuse(self, needed: int, what: str) -> NoReturn:
        left = self.options.memory_bytes
        raise RecipeError(
            f"the memory budget leaves {left / 1e6:.0f} MB for the merge, {what} needs {needed / 1e6:.0f} MB: raise "
            f"--memory (memory= in Python) by {(needed - left) / 1e6:.0f} MB"
        )

    def items(self, entries: Sequence[Entry]) -> list[Item]:
        return [item for entry in entries for item in self.items_of(entry)]

    def items_of(self, entry: Entry) -> list[Item]:
        total = math.prod(entry.shape)
        items = []
        if entry.merged:
            items.append(self.merge_item(entry))
        if total > entry.count or total == 0:  # what is copied; an empty tensor is one empty copy
            first = entry.count if entry.merged else 0
            items.append(self.tiled(Item(entry=entry, mode="copy", first=first, count=total - first, tile=TILE)))
        return items

    def merge_item(self, entry: Entry) -> Item:
        steps = entry.steps
        assert steps is not None
        if not element_wise(steps) or self.options.device != "cpu":
            return Item(entry=entry, mode="generic", first=0, count=entry.count, tile=entry.count)
        shape = (entry.count // max(1, math.prod(entry.shape[1:])), *entry.shape[1:]) if entry.shape else ()
        info = TensorInfo(name=entry.name, shape=shape, tasks=len(entry.tuned), seed=self.recipe.seed)
        assert isinstance(steps.combine, ElementWiseCombine)
        rule = chain_rule(steps.purify, steps.combine, info)
        item = Item(entry=entry, mode="tiles", first=0, count=entry.count, tile=TILE, rule=rule)
        if survey_scope(steps) == "model":
            return self.tiled(item)
        if rule.needs_survey:
            held = item.block_bytes(item.count) <= self.arena_bytes // 2
            item = replace(item, mode="held" if held else "swept")
        return self.tiled(item)

    def tiled(self, item: Item) -> Item:
        """The item with the largest tile that leaves room for several in flight."""
        tile = TILE
        smallest = SUM_BLOCK if item.mode == "swept" else 1 << 14
        while tile > smallest and item.block_bytes(tile) > self.arena_bytes // 6:
            tile //= 2
        row = item.rule.row_length if item.rule is not None else None
        if row:
            tile = max(1, tile // row) * row
        if item.block_bytes(min(tile, item.count)) > self.arena_bytes // 2:
            self.refuse(2 * item.block_bytes(min(tile, item.count)) + SLACK, item.entry.name)
        return replace(item, tile=max(1, tile))


def make_plan(
    recipe: Recipe, base: Checkpoint | None, models: Sequence[Checkpoint], labels: Sequence[str], options: Options
) -> Plan:
    """Check everything that headers tell, then plan. Raises one error with all problems."""
    entries, notes = check(recipe, base, models, labels)
    planner = Planner(recipe, options)
    items = planner.items(entries)
    layout = plan_layout(
        [(entry.name, entry.dtype, entry.shape) for entry in entries], options.shard_bytes, {"format": "pt"}
    )
    groups: dict[int, tuple[Steps, list[Item]]] = {}
    for item in items:
        steps = item.entry.steps
        if item.rule is not None and steps is not None and survey_scope(steps) == "model":
            groups.setdefault(id(steps), (steps, []))[1].append(item)
    numbers = {key: number for number, key in enumerate(groups)}
    items = [
        replace(item, survey_scope=numbers[id(item.entry.steps)])
        if id(item.entry.steps) in numbers and item.rule
        else item
        for item in items
    ]
    return Plan(
        recipe=recipe,
        items=tuple(items),
        layout=layout,
        arena_bytes=planner.arena_bytes,
        notes=notes,
        surveys=tuple((steps, tuple(covered)) for steps, covered in groups.values()),
    )
