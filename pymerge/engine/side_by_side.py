"""One plan for several merges of the same models: what is read once, and what is made of it for each output.

A pass takes a part of the memory for outputs that are being written. Outputs that differ in the scale alone are made of
one update, as `engine.scaled` does from disk: base + scale * update has the bits of a merge at that scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from pymerge.engine.check import Entry
from pymerge.engine.local import Inputs, planned
from pymerge.engine.plan import BATCH, SLACK, SMALLEST_ARENA, Item, Mode, Options, Plan
from pymerge.engine.scaled import why_merged_anew
from pymerge.engine.several import Family, Together, place_bytes
from pymerge.engine.survey import HIGH_BINS
from pymerge.errors import RecipeError
from pymerge.methods.base import TensorInfo
from pymerge.methods.matrices import OfTaskVectors
from pymerge.recipe import Recipe, Steps

ROOM = 4  # one part in so many of the memory is for outputs that are being written
MODES: tuple[Mode, ...] = ("copy", "tiles", "held", "swept", "generic")  # each does what those before it do


@dataclass(frozen=True, kw_only=True)
class Alone:
    """One output as a merge of its own would make it; number: its place among all."""

    number: int
    label: str
    recipe: Recipe
    unscaled: Recipe | None
    inputs: Inputs
    plan: Plan


def ranges_of(plan: Plan) -> tuple[Any, ...]:
    """Equal for plans that one pass can serve: they read the same, and with the same numeric threads an item."""
    ranges = [(i.entry.name, i.first, i.count, i.mode == "copy", i.mode == "generic", i.factored) for i in plan.items]
    return plan.item_threads, tuple(ranges)


def together(group: Sequence[Alone], options: Options) -> Together:
    """The pass for outputs of equal ranges. RecipeError where the memory is too small for it."""
    room = options.memory_bytes // ROOM
    kept = room + counting_bytes(group, options.thread_count)
    if (missing := SLACK + SMALLEST_ARENA + kept - options.memory_bytes) > 0:
        refuse(options, missing * ROOM // (ROOM - 1))
    smaller = replace(options, memory=options.memory_bytes - kept)
    makers = [maker_of(group, members, smaller) for members in families_of(group)]
    whole = [
        own.peak_bytes
        for maker in makers
        for own, item in zip(group[0].plan.items, maker.plan.items, strict=True)
        if own.factored and not item.factored
    ]
    if whole:  # merged as whole matrices they would have other bits than in a merge alone
        refuse(options, (max(whole) - makers[0].plan.arena_bytes) * ROOM // (ROOM - 1) + 1)
    shapes = [unified(items) for items in zip(*(maker.plan.items for maker in makers), strict=True)]
    lead = next((maker.plan for maker in makers if maker.scaled), makers[0].plan)
    reading = with_items(lead, [shape.of_reading(item) for shape, item in zip(shapes, lead.items, strict=True)])
    families = [shaped(maker, shapes, group) for maker in makers]
    check_memory(reading, families, room, options)
    return Together(reading=reading, families=tuple(families), room=room, labels=tuple(alone.label for alone in group))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How all plans treat one range."""

    mode: Mode
    tile: int
    workspace: int

    def of(self, item: Item) -> Item:
        return replace(item, mode=self.mode, tile=self.tile)

    def of_reading(self, item: Item) -> Item:
        entry = item.entry if item.mode == "copy" else replace(item.entry, adds=True)
        return replace(self.of(item), entry=entry, workspace=self.workspace)


def unified(items: Sequence[Item]) -> Shape:
    """Of one range in several plans: what suits all of them. Where entries must be seen together, all plans agree on
    which, or one sees all of them."""
    mode = MODES[max(MODES.index(item.mode) for item in items)]
    sizes = [item.tile for item in items if item.mode == mode]
    tile = min(sizes)
    if mode == "generic":
        tile = max(sizes) if all(max(sizes) % size == 0 for size in sizes) else items[0].count
    return Shape(mode=mode, tile=tile, workspace=max(item.workspace for item in items))


def counting_bytes(group: Sequence[Alone], threads: int) -> int:
    """What surveys of more than is held in memory count in, for each output and thread."""
    tasks = [len(i.entry.tuned) for i in group[0].plan.items if i.mode == "swept" or i.survey_scope is not None]
    return len(families_of(group)) * threads * 8 * HIGH_BINS * max(tasks, default=0)


def families_of(group: Sequence[Alone]) -> list[list[int]]:
    """Places of the outputs that one update serves."""
    first = group[0]
    merged = [item.entry for item in first.plan.items if item.mode != "copy"]
    anew = first.plan.observed or why_merged_anew(first.recipe)  # observed: some modules may turn out not to run
    if first.unscaled is None or anew or any(entry.base is None for entry in merged):
        return [[n] for n in range(len(group))]
    found: dict[str, list[int]] = {}
    for n, alone in enumerate(group):
        assert alone.unscaled is not None
        found.setdefault(alone.unscaled.digest(), []).append(n)
    return list(found.values())


def maker_of(group: Sequence[Alone], members: Sequence[int], options: Options) -> Family:
    """One output's own plan, or that of the update of several, with what is copied as the output has it."""
    first, scaled = group[members[0]], len(members) > 1
    recipe = first.unscaled if scaled and first.unscaled is not None else first.recipe
    plan = planned(recipe, first.inputs, options, as_updates if scaled else None)
    items = [own if own.mode == "copy" else item for own, item in zip(first.plan.items, plan.items, strict=True)]
    plan = replace(with_items(plan, items), layout=first.plan.layout, item_threads=first.plan.item_threads)
    return Family(plan=plan, outputs=dict.fromkeys(members, plan), scaled=scaled)


def as_updates(entries: Sequence[Entry]) -> list[Entry]:
    return [replace(entry, dtype="F32", adds=False) if entry.merged else entry for entry in entries]


def shaped(maker: Family, shapes: Sequence[Shape], group: Sequence[Alone]) -> Family:
    """The family with its ranges as all treat them; the models run for the reading plan alone."""
    items = [shape.of(item) for shape, item in zip(shapes, maker.plan.items, strict=True)]
    plan = replace(with_items(maker.plan, items), observed=())
    if not maker.scaled:
        return replace(maker, plan=plan, outputs=dict.fromkeys(maker.outputs, plan))
    outputs = {}
    for n in maker.outputs:
        own = [scaled_item(item, shape) for shape, item in zip(shapes, group[n].plan.items, strict=True)]
        outputs[n] = replace(with_items(group[n].plan, own), observed=())
    return replace(maker, plan=plan, outputs=outputs)


def scaled_item(item: Item, shape: Shape) -> Item:
    """The item made of base and update."""
    entry, steps = item.entry, item.entry.steps
    if item.mode == "copy" or steps is None:
        return shape.of(item)
    factor = steps.combine.factor_of(entry.name, bool(entry.inputs))
    adding = OfTaskVectors(how="sum", scale=factor)
    entry = replace(
        entry,
        tuned=(entry.reference,),  # stands for the update
        weights=(),
        steps=Steps(purify=(), combine=adding, calibrate=()),
        subtracts=False,
    )
    rule = adding.rule(TensorInfo(name=entry.name, shape=entry.shape, tasks=1))
    return replace(
        item, entry=entry, rule=rule, mode="tiles", tile=shape.tile, survey_scope=None, workspace=0, factored=False
    )


def with_items(plan: Plan, items: Sequence[Item]) -> Plan:
    """The plan with other items of the same ranges, in its questions too."""
    now = {(item.entry.name, item.first): item for item in items}

    def those(old: Sequence[Item]) -> tuple[Item, ...]:
        return tuple(now[item.entry.name, item.first] for item in old)

    return replace(
        plan,
        items=tuple(items),
        surveys=tuple((steps, those(old)) for steps, old in plan.surveys),
        questions=tuple((steps, those(old)) for steps, old in plan.questions),
        purify_questions=tuple((step, those(old)) for step, old in plan.purify_questions),
    )


def check_memory(reading: Plan, families: Sequence[Family], room: int, options: Options) -> None:
    """That all that is read and all that is written at once fits."""

    def place(item: Item) -> int:
        return place_bytes(item, min(item.tile, item.count))

    written = max(
        (most_at_once(plan.items, place) for family in families for plan in family.outputs.values()), default=0
    )
    read = most_at_once(reading.items, lambda item: item.peak_bytes)
    missing = max(ROOM * (max(written, BATCH) - room), (read - reading.arena_bytes) * ROOM // (ROOM - 1))
    if missing > 0:
        refuse(options, missing)


def refuse(options: Options, missing: int) -> NoReturn:
    left, needed = options.memory_bytes / 1e6, (options.memory_bytes + missing) / 1e6
    raise RecipeError(
        f"the memory budget leaves {left:.0f} MB for the merge, a sweep of these models needs {needed:.0f} MB: raise "
        f"--memory (memory= in Python) by {needed - left:.0f} MB, or sweep fewer values"
    )


def most_at_once(items: Sequence[Item], size: Callable[[Item], int]) -> int:
    """The largest of what is worked on at once: a range, or matrices that are merged as one."""
    groups: dict[object, int] = {}
    for number, item in enumerate(items):
        key = number if item.entry.join is None else ("join", item.entry.join[0])
        groups[key] = groups.get(key, 0) + size(item)
    return max(groups.values(), default=0)
