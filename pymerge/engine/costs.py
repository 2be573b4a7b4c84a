"""What the items of a plan cost: bytes, and seconds of one thread at given rates."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pymerge.engine.plan import Item, Plan
from pymerge.engine.rates import Rates
from pymerge.methods.work import NOTHING, Work
from pymerge.ops.delta_rule import DeltaRule

SAMPLES = 32  # places of a file at which the page cache is asked


class Cost(NamedTuple):
    """Of one item in one pass over the inputs.

    read, written  bytes
    kernels        entries by kind of native kernel: see rates.KERNELS
    work           what steps that are no rule compute
    divisible      threads may share it, tile by tile
    """

    read: int
    written: int
    kernels: dict[str, float]
    work: Work
    divisible: bool

    def seconds(self, rates: Rates) -> float:
        """Of one thread."""
        w = self.work
        torch = w.single / rates.single + w.double / rates.double + w.eigen / rates.eigen + w.touched / rates.touch
        return torch + sum(count * rates.kernels[kind] for kind, count in self.kernels.items())


@dataclass(frozen=True)
class Phase:
    """A pass over the inputs: what it costs item by item. One begins when the one before has ended."""

    name: str
    items: tuple[Item, ...]
    costs: tuple[Cost, ...]


def phases(plan: Plan) -> list[Phase]:
    """The passes of a plan: model-wide questions, where there are some, then the merge."""
    asked = [item for item in plan.items if item.survey_reads]
    found = [Phase("survey", tuple(asked), tuple(map(survey_cost, asked)))] if asked else []
    return [*found, Phase("merge", plan.items, tuple(map(merge_cost, plan.items)))]


def merge_cost(item: Item) -> Cost:
    """Of the pass that writes."""
    kernels: dict[str, float] = {"entry": item.count}
    if item.mode != "copy" and item.rule is not None and item.mode != "generic":
        kernels |= rule_entries(item.rule, item.count, held=item.mode == "held" and item.survey_scope is None)
    elif item.mode == "generic":
        kernels["task"] = item.count * len(item.entry.tuned)  # bad inputs are looked for
    return Cost(
        item.read_bytes + moment_bytes(item), item.count * item.out_width, kernels, item.work, item.mode != "generic"
    )


def survey_cost(item: Item) -> Cost:
    """Of all passes that only look, as one."""
    entries, reads = item.count * len(item.entry.tuned), item.survey_reads
    kernels: dict[str, float] = {}
    if item.rule is not None and item.rule_reads:
        kernels = questions(item.rule, entries, held=False)
    work = item.work if item.mode == "generic" else NOTHING  # what a step asks is most of what it computes
    return Cost(reads * item.read_bytes, 0, kernels, work, item.mode != "generic")


def moment_bytes(item: Item) -> int:
    """Of the statistics that an item reads: a triangle of each input's second moments in float32."""
    width = item.shape[0 if item.entry.transposed else -1] if item.entry.inputs else 0
    return len(item.entry.inputs) * 2 * width * (width + 1)


def rule_entries(rule: DeltaRule, count: int, *, held: bool) -> dict[str, float]:
    """Entries that a rule's pass and, of a tensor in memory, its questions go through."""
    entries = float(count * len(rule.weights))
    found = {"task": entries}
    if rule.keep is not None:
        found["random"] = entries
    if rule.elect is not None:
        found["elect"] = entries
    if rule.top is not None or rule.skip is not None:
        found["cut"] = entries
    return found | (questions(rule, entries, held=True) if held else {})


def questions(rule: DeltaRule, entries: float, *, held: bool) -> dict[str, float]:
    """What `resolve` asks."""
    cuts = (rule.top is not None) + (rule.skip is not None)
    asked = {
        "kth" if held else "histogram": (1 if held else 2) * cuts,
        "gram": int(rule.gram_weights is not None),
        "l1": int(rule.rescale == "l1"),
        "signs": int(rule.elect == "authors"),
    }
    found = {kind: count * entries for kind, count in asked.items() if count}
    return found | ({"asked": float(cuts * len(rule.weights))} if held and cuts else {})


def files_of(plan: Plan) -> set[Path]:
    """What a merge reads."""
    return {tensor.file for item in plan.items for tensor in item.inputs if tensor.file is not None}


def cached_share(files: Iterable[Path]) -> float:
    """Share of the bytes of some files that is in the page cache, by samples; 0 where the system cannot tell."""
    total = held = 0.0
    page = bytearray(4096)
    for path in files:
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                found = sum(is_cached(file.fileno(), page, size * i // SAMPLES) for i in range(SAMPLES))
        except OSError:
            continue
        total, held = total + size, held + size * found / SAMPLES
    return held / total if total else 0.0


def is_cached(fd: int, page: bytearray, offset: int) -> bool:
    try:
        return os.preadv(fd, [page], offset, os.RWF_NOWAIT) > 0
    except (BlockingIOError, OSError):
        return False


def needs_torch(items: Sequence[Item]) -> bool:
    return any(item.mode == "generic" for item in items)
