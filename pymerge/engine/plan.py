"""The ordered list of what a merge reads, computes and writes, with bytes and memory, before anything is computed.

Tiles: element-wise work is cut into ranges of entries, so the memory floor does not depend on the largest tensor. A
rule that must look at the whole tensor first (TIES, SLERP, ...) holds the tensor if it fits into half of the arena and
sweeps over it in tiles otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeGuard

from pymerge.checkpoint import ITEMSIZE, AnyTensor, Checkpoint, Layout, MemoryTensor, plan_layout
from pymerge.engine.asking import (
    asking_purify,
    asks_model,
    by_steps,
    purify_questions,
    rule_part,
    survey_key,
    survey_scope,
)
from pymerge.engine.check import Entry, check, tensor_counts
from pymerge.engine.devices import HOST, Device, devices_of, placed, refuse_device, remarks
from pymerge.engine.expert_matrices import Part
from pymerge.engine.factored import factored_item, rank_sum, weight_under
from pymerge.engine.joined import joined
from pymerge.engine.network import offline
from pymerge.engine.observing import observing_bytes
from pymerge.engine.options import Options
from pymerge.engine.parts import Parts, check_parts
from pymerge.errors import RecipeError
from pymerge.methods.base import ElementWiseCombine, Method, TensorInfo, chain_rule, merges_by_rule
from pymerge.methods.surveyed import SUM_BLOCK as SURVEY_BLOCK
from pymerge.methods.surveyed import SurveyedCombine, SurveyedPurify
from pymerge.methods.work import NOTHING, Work
from pymerge.ops.delta_rule import DeltaRule
from pymerge.recipe import Recipe, Steps

if TYPE_CHECKING:
    from pymerge.statistics import Statistics
    from pymerge.statistics.live import LiveStatistics

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
    rule: DeltaRule | None = None  # of the element-wise steps up to combine, unanswered
    survey_scope: int | None = None  # number of the model-wide survey that answers the rule
    workspace: int = 0  # bytes that the steps of a generic item take beside inputs and output, for a tile
    part: Part | None = None  # what of experts stored as one it is
    factored: bool = False  # adapters, merged by their factors: of the models only the weight under them is read
    device: str = HOST  # where a generic item is computed

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is merged."""
        return self.entry.merged_shape if self.part is None else self.part.shape

    @property
    def split(self) -> tuple[int, tuple[int, ...]] | None:
        return self.entry.split if self.part is None else self.part.split

    def info(self, seed: int) -> TensorInfo:
        """What methods are told of it."""
        info = self.entry.info(seed)
        return info if self.part is None else replace(info, name=self.part.name, shape=self.part.shape)

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
        if self.factored:
            weight = weight_under(entry) if entry.adds else None
            return () if weight is None else (weight,)
        return ((entry.base,) if entry.base is not None else ()) + entry.tuned + entry.weights

    @property
    def out_width(self) -> int:
        return ITEMSIZE[self.entry.dtype]

    def lent(self, tensor: AnyTensor) -> TypeGuard[MemoryTensor]:
        """Whether an input is used where it is: it is in memory, and nothing is written over it."""
        return self.mode != "copy" and isinstance(tensor, MemoryTensor) and tensor.lendable

    def block_bytes(self, count: int) -> int:
        """Arena bytes for the inputs and the output of `count` entries, with alignment."""
        sizes = zip(self.inputs, self.input_bytes(count), strict=True)
        return sum(-(-n // 4096) * 4096 for t, n in sizes if not self.lent(t)) + count * self.out_width + 3 * 4096

    @property
    def peak_bytes(self) -> int:
        """Memory of this computer while the item is worked on: a tile of it, or all of it."""
        tile = self.count if self.mode == "held" else min(self.tile, self.count)
        return self.block_bytes(tile) + self.host_workspace

    @property
    def host_workspace(self) -> int:
        return self.workspace if self.device == HOST else 0

    def resident_bytes(self, count: int) -> int:
        """Bytes of the inputs and the output of `count` entries."""
        return sum(self.input_bytes(count)) + count * self.out_width

    @property
    def device_bytes(self) -> int:
        """Memory of a device while the item is worked on there."""
        return self.resident_bytes(min(self.tile, self.count)) + self.workspace

    @property
    def flops(self) -> int:
        """Floating-point operations of the merge pass: subtract, weigh and add per task, add the base and scale; about
        two a task and entry for surveys. Steps for matrices say their own."""
        if self.mode == "copy":
            return 0
        tasks, asked = len(self.entry.tuned), self.rule is not None and self.rule.needs_survey
        element_wise = self.count * (3 * tasks + 2 + (2 * tasks if asked else 0))
        return element_wise + int(self.work.flops)

    @property
    def work(self) -> Work:
        """What the steps that are no rule compute; matrices merged as one are counted apart."""
        if self.mode != "generic":
            return NOTHING
        assert self.entry.steps is not None
        if self.factored:
            return Work(single=2.0 * self.count * rank_sum(self.entry))
        return sum((step.work(self.info(seed=0)) for step in self.entry.steps.all), NOTHING)

    @property
    def survey_reads(self) -> int:
        """How often the inputs are read again for surveys of more than is held in memory."""
        return self.rule_reads + (self.mode == "generic" and asking_purify(self.entry.steps) is not None)

    @property
    def rule_reads(self) -> int:
        if self.mode == "generic" and (asking := asks_model(self.entry.steps)) is not None:
            return 0 if self.factored else asking.rounds
        if self.rule is None or not (self.mode == "swept" or self.survey_scope is not None):
            return 0
        kth = 2 * ((self.rule.top is not None) + (self.rule.skip is not None))
        return kth + (self.rule.gram_weights is not None) + (self.rule.rescale == "l1") + (self.rule.elect == "authors")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will happen, in order."""

    recipe: Recipe
    items: tuple[Item, ...]
    layout: Layout
    arena_bytes: int
    notes: list[str] = field(default_factory=list)
    surveys: tuple[tuple[Steps, tuple[Item, ...]], ...] = ()  # model-wide: the steps and the items they cover
    questions: tuple[tuple[Steps, tuple[Item, ...]], ...] = ()  # likewise, of combine steps that are no rule
    purify_questions: tuple[tuple[SurveyedPurify, tuple[Item, ...]], ...] = ()  # of purify steps: their matrices
    vocabulary: Mapping[str, Any] | None = None  # where the models' rows come from: see NewVocabulary.summary
    alignment: Mapping[str, Any] | None = None  # of the models' units, where it is known: see Alignment.summary
    item_threads: int = 1  # numeric threads of a generic item; its bits depend on them
    at_once: int = 1  # generic items that are worked on side by side
    observed: tuple[LiveStatistics, ...] = ()  # of the models that run over their samples during the merge
    observing_threads: int = 1  # numeric threads of one model's run, likewise
    devices: tuple[Device, ...] = ()  # beside the CPU, with what comes to them
    pinned_bytes: int = 0  # memory of this computer for what comes to devices, beside arena_bytes

    @property
    def main_device(self) -> str:
        """Where matrices are computed beside the plan's items."""
        return self.devices[0].name if self.devices else HOST

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


def too_little_memory(left: int, needed: int, what: str) -> RecipeError:
    shown = max(0, left) / 1e6  # what the libraries take may be more than was given
    return RecipeError(
        f"the memory budget leaves {shown:.0f} MB for the merge, {what} needs {needed / 1e6:.0f} MB: raise "
        f"--memory (memory= in Python) by {(needed - left) / 1e6:.0f} MB"
    )


class Planner:
    """Cuts checked entries into items under a memory budget."""

    def __init__(self, recipe: Recipe, options: Options, reserved: int = 0) -> None:
        self.recipe, self.options, self.reserved = recipe, options, reserved
        self.devices, self.host = devices_of(options.device, options.device_memory)
        self.arenas = 2 if self.devices else 1  # of the same size, see Plan.pinned_bytes
        self.arena_bytes = (options.memory_bytes - SLACK - reserved) // self.arenas
        if self.arena_bytes < SMALLEST_ARENA:
            what = "a merge that observes its models" if reserved else "a merge"
            self.refuse(SLACK + self.arenas * SMALLEST_ARENA, what)

    def refuse(self, needed: int, what: str) -> NoReturn:
        raise too_little_memory(self.options.memory_bytes, needed + self.reserved, what)

    def items(self, entries: Sequence[Entry]) -> list[Item]:
        return [item for entry in entries for item in self.items_of(entry)]

    def items_of(self, entry: Entry) -> list[Item]:
        total = math.prod(entry.shape)
        items = []
        if entry.merged:
            items += [self.merge_item(entry, part) for part in entry.parts or (None,)]
        if total > entry.count or total == 0:  # what is copied; an empty tensor is one empty copy
            first = entry.count if entry.merged else 0
            items.append(self.tiled(Item(entry=entry, mode="copy", first=first, count=total - first, tile=TILE)))
        return items

    def merge_item(self, entry: Entry, part: Part | None = None) -> Item:
        steps = entry.steps
        assert steps is not None
        combine = steps.combine
        first, count = (part.first, part.count) if part is not None else (0, entry.count)
        item = Item(entry=entry, mode="generic", first=first, count=count, tile=count, part=part)
        info = item.info(self.recipe.seed)
        rule = None
        before, behind = rule_part(steps)
        behind_matrices = before and survey_scope(steps) == "tensor"
        if isinstance(combine, ElementWiseCombine) and combine.element_wise and not behind_matrices:
            rule = chain_rule(behind, combine, info)
        as_one = entry.join is not None and (rule is not None or asks_model(steps) is not None)
        if before and (as_one or (rule is not None and any(step.element_wise for step in before))):
            raise RecipeError(
                f"{entry.name}: {combine.name} asks the whole model: behind {before[-1].name} it goes with no join, "
                "and with element-wise purify steps only between the two"
            )
        item = replace(item, rule=rule)
        if (factored := factored_item(item, info, self.arena_bytes)) is not None:
            return self.fitting([factored], entry.name)[0]
        if rule is None or before or not self.streams(steps):
            return self.generic(item, info)
        item = replace(item, mode="tiles", tile=TILE)
        if survey_scope(steps) == "model":
            return self.tiled(item)
        if rule.needs_survey:
            held = item.block_bytes(item.count) <= self.arena_bytes // 2
            item = replace(item, mode="held" if held else "swept")
        return self.tiled(item)

    def streams(self, steps: Steps) -> bool:
        """Whether an element-wise rule runs on the byte buffers of the stream."""
        return not steps.calibrate and self.host

    def generic(self, item: Item, info: TensorInfo) -> Item:
        """An item of steps that are no rule: a whole tensor, or blocks of rows or entries where all steps allow it."""
        steps = item.entry.steps
        assert steps is not None
        row = math.prod(info.shape[1:])
        together = max(1, min(item.count, math.lcm(*(self.together(step, item, row) for step in steps.all))))
        cut = partial(self.cut, info=info, together=together)
        # A rule that is asked about the model behind matrices' steps is asked on the CPU.
        if self.devices and (item.rule is None or not rule_part(steps)[0]):
            found = cut(replace(item, device=self.devices[0].name))
            if not self.host or self.taken([found]) <= 1:
                return self.fitting([found], item.entry.name)[0]
        return self.fitting([cut(item)], item.entry.name)[0]

    def cut(self, item: Item, info: TensorInfo, together: int) -> Item:
        """The item with the largest tile, of so many entries or a multiple, that leaves room for several in flight."""
        tile = max(together, TILE // max(1, together) * together)
        while tile > together and self.taken([self.sized(item, info, tile)]) > 1 / 4:
            tile = max(together, tile // 2 // together * together)
        return self.sized(item, info, max(1, min(tile, item.count)))

    def taken(self, items: Sequence[Item]) -> float:
        """What items that are worked on at once take, as a share of what there is."""
        share = sum(item.peak_bytes for item in items) / self.arena_bytes
        if items[0].device == HOST:
            return share
        return max(share, sum(item.device_bytes for item in items) / max(device.memory for device in self.devices))

    def fitting(self, items: list[Item], name: str) -> list[Item]:
        """Raises RecipeError where there is no room for items that are worked on at once."""
        if sum(item.peak_bytes for item in items) > self.arena_bytes:
            self.refuse(self.arenas * sum(item.peak_bytes for item in items) + SLACK, name)
        if items[0].device != HOST and self.taken(items) > 1:
            refuse_device(self.devices, sum(item.device_bytes for item in items), name)
        return items

    def together(self, step: Method, item: Item, row: int) -> int:
        """Entries that a step must see at once: it sees multiples of them."""
        if step.element_wise:  # by its rule: all of the tensor, if that asks about it
            asks = item.rule is None or item.rule.needs_survey or item.rule.keep is not None
            return item.count if asks else 1
        if isinstance(step, SurveyedCombine) and step.unit == "entries":
            return SURVEY_BLOCK
        rows = row if len(item.shape) > 1 else item.count  # a vector is one row
        return {"tensor": item.count, "rows": rows, "entries": 1}[step.unit]

    def sized(self, item: Item, info: TensorInfo, tile: int) -> Item:
        row = math.prod(info.shape[1:])
        shape = (tile // row, *info.shape[1:]) if row and tile % row == 0 else (tile,)
        if item.entry.transposed:
            shape = shape[::-1]
        assert item.entry.steps is not None
        return replace(item, tile=tile, workspace=self.workspace(item.entry.steps, replace(info, shape=shape)))

    def workspace(self, steps: Steps, info: TensorInfo) -> int:
        """Bytes beside inputs and output: the merged update, purified task vectors, and what one step takes."""
        purified = bool(steps.purify) and not merges_by_rule(steps.purify, steps.combine)
        kept = 4 * info.numel * (1 + (info.tasks if purified else 0))
        return kept + max(step.workspace(info) for step in steps.all)

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
    recipe: Recipe,
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    labels: Sequence[str],
    options: Options,
    fisher: Sequence[Checkpoint] = (),
    statistics: Sequence[Statistics] = (),
    change: Callable[[Sequence[Entry]], Sequence[Entry]] | None = None,
    parts: Parts | None = None,
) -> Plan:
    """Check everything that headers tell, then plan. Raises one error with all problems.

    change  makes other entries of those that the recipe asks for (`engine.scaled`)
    parts   of a recipe of slices or modules, in place of the models"""
    given = (recipe, base, models, labels, fisher, statistics)
    entries, notes = check(*given) if parts is None else check_parts(recipe, parts)
    entries = change(entries) if change is not None else entries
    live: Any = tuple(found for found in statistics if found.live)
    planner = Planner(recipe, offline(options, base, models, fisher, statistics), sum(observing_bytes(live).values()))
    items, components = planner.items(entries), (base if base is not None else models[0]).components
    layout = plan_layout([(e.name, e.dtype, e.shape) for e in entries], options.shard_bytes, None, components)
    surveyed = [i for i in items if i.rule is not None and i.entry.steps and survey_scope(i.entry.steps) == "model"]
    groups = by_steps(surveyed)
    numbers = {key: number for number, key in enumerate(groups)}
    for i, item in enumerate(items):
        if item.rule is not None and item.entry.steps is not None:
            items[i] = replace(item, survey_scope=numbers.get(survey_key(item.entry.steps)))
    items, devices = placed(joined(planner, items), planner.devices)
    hosted = [item.peak_bytes for item in items if item.mode == "generic" and item.device == HOST]
    at_once = max(1, min(options.thread_count, planner.arena_bytes // max(hosted))) if hosted else options.thread_count
    beside = len(devices) if devices and not hosted else at_once  # how many compute with threads of the CPU
    return Plan(
        recipe=recipe,
        items=tuple(items),
        layout=layout,
        arena_bytes=planner.arena_bytes,
        notes=[*notes, *remarks(items, devices)],
        item_threads=max(1, options.thread_count // beside),
        at_once=at_once,
        observed=live,
        observing_threads=max(1, options.thread_count // max(1, len(live))),
        surveys=tuple(groups.values()),
        purify_questions=purify_questions(items),
        devices=devices,
        pinned_bytes=min(planner.arena_bytes, sum(i.block_bytes(i.count) for i in items if i.device != HOST)),
        questions=tuple(by_steps([i for i in items if i.mode == "generic" and asks_model(i.entry.steps)]).values()),
    )
