"""The experts and prototypes of the tasks beside a model merged by ESM++: one more pass over the routed matrices."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pymerge.checkpoint import ITEMSIZE, AnyTensor, open_checkpoint, safe_name
from pymerge.checkpoint.side_tensors import SideTensors
from pymerge.engine.arena import FREED
from pymerge.engine.inputs import shortened
from pymerge.engine.plan import Item, Plan
from pymerge.errors import NumericError, Overflow, RecipeError
from pymerge.methods.esmpp import EsmPlusPlus

if TYPE_CHECKING:
    from torch import Tensor

EXPERTS = "esmpp_experts.safetensors"
FORMAT = "1"  # of that file


@dataclass(frozen=True, kw_only=True)
class Routed:
    """A matrix [m, n] that gets experts: <name>.B [T, m, r], <name>.A [T, r, n], and prototypes [T, n]."""

    item: Item
    rank: int
    dtype: str
    prototypes: str  # shared by matrices that share their input

    @property
    def name(self) -> str:
        return self.item.entry.name

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.item.entry.shape
        return (n, m) if self.item.entry.transposed else (m, n)

    @property
    def entries(self) -> list[tuple[str, str, tuple[int, ...]]]:
        tasks, (m, n) = len(self.item.entry.tuned), self.shape
        return [
            (f"{self.name}.B", self.dtype, (tasks, m, self.rank)),
            (f"{self.name}.A", self.dtype, (tasks, self.rank, n)),
        ]

    @property
    def holds_prototypes(self) -> bool:
        return self.prototypes == f"{self.name}.prototypes"


def routed_matrices(plan: Plan) -> list[Routed]:
    """In the order of the plan."""
    found: list[Routed] = []
    holders: dict[tuple[str, ...], str] = {}  # the modules that hold the moments of an input -> its prototypes
    for item in plan.items:
        entry, combine = item.entry, item.entry.steps.combine if item.entry.steps is not None else None
        whole = item.count == math.prod(entry.shape)
        if not isinstance(combine, EsmPlusPlus) or not entry.inputs or not whole or not combine.routes(entry.name):
            continue
        holder = tuple(seen.statistics.header.modules[seen.module] for seen in entry.inputs)
        found.append(
            Routed(
                item=item,
                rank=combine.rank_of_expert(entry.name, entry.shape),
                dtype=combine.factor_dtype(entry.name, entry.dtype),
                prototypes=holders.setdefault(holder, f"{entry.name}.prototypes"),
            )
        )
    return found


def check_experts(plan: Plan) -> list[str]:
    """Notes for the summary. Raises RecipeError where no matrix gets experts."""
    found = routed_matrices(plan)
    if not found:
        known = [safe_name(item.entry.name) for item in plan.items if item.entry.inputs]
        raise RecipeError(
            f"{plan.recipe.method}: no matrix gets experts: none of those with statistics is one that `routed` names "
            f"(patterns, with spaces between); they are {shortened(known) or 'none'}"
        )
    size = sum(math.prod(shape) * ITEMSIZE[dtype] for one in found for _, dtype, shape in one.entries)
    ranks = sorted({one.rank for one in found})
    text = f"experts of rank {', '.join(map(str, ranks))} for {len(found)} matrices: {size / 1e6:.1f} MB in {EXPERTS}"
    few = [safe_name(one.name) for one in found if any(seen.rows < one.rank for seen in one.item.entry.inputs)]
    return [text, *([f"fewer rows of statistics than the rank of the experts: {shortened(few)}"] if few else [])]


def write_experts(folder: Path, plan: Plan, metadata: Mapping[str, str]) -> dict[str, int]:
    """Writes experts and prototypes into the folder of the finished weights. Returns the checksum of the file.

    metadata  of the file: the models' names

    Memory   for each matrix that is worked on, as many at once as in the merge: two matrices as stored, their
             difference, and what the directions of one task take (ESM's workspace has that already)"""
    from pymerge.engine.generic import threads_of_numerics, use_threads

    layers = routed_matrices(plan)
    entries = [entry for one in layers for entry in one.entries]
    entries += [
        (one.prototypes, "F32", (len(one.item.entry.tuned), one.shape[1])) for one in layers if one.holds_prototypes
    ]
    described = {
        "pymerge_esmpp": FORMAT,
        "rank": str(max(one.rank for one in layers)),
        "prototypes": json.dumps({one.name: one.prototypes for one in layers}),
        **metadata,
    }
    with ExitStack() as stack:
        shards = [stack.enter_context(open_checkpoint(folder / shard.file)) for shard in plan.layout.shards]
        file = stack.enter_context(SideTensors(folder / EXPERTS, entries, described))
        stack.enter_context(threads_of_numerics(plan.item_threads))
        at_once = 1 if plan.devices else plan.at_once
        pool = ThreadPoolExecutor(at_once, initializer=use_threads, initargs=(plan.item_threads,))
        stack.callback(pool.shutdown, cancel_futures=True)
        written = [shards[plan.layout.slots[one.name].shard][one.name] for one in layers]
        for _ in pool.map(lambda one, merged: write_one(file, one, merged, plan.main_device), layers, written):
            pass
    return {EXPERTS: file.checksum}


def write_one(file: SideTensors, one: Routed, merged: AnyTensor, device: str) -> None:
    """The experts of one matrix, task after task, and its prototypes."""
    import torch

    from pymerge.methods._esm import expert

    def oriented(tensor: AnyTensor) -> Tensor:
        loaded = tensor.load().to(device)
        return loaded.mT if one.item.entry.transposed else loaded

    base = oriented(merged)
    for task, (tuned, seen) in enumerate(zip(one.item.entry.tuned, one.item.entry.inputs, strict=True)):
        try:
            left, right = expert(base, oriented(tuned), seen, one.rank)
        except NumericError as error:
            raise NumericError(f"{safe_name(one.name)}: {error}") from error
        spare = one.rank - left.shape[1]  # directions that the samples do not have
        padded = torch.nn.functional.pad(left, (0, spare)), torch.nn.functional.pad(right, (0, 0, 0, spare))
        for (name, dtype, _), factor in zip(one.entries, padded, strict=True):
            put(file, name, task, factor, dtype)
        if one.holds_prototypes:
            mean = seen.mean.double()
            put(file, one.prototypes, task, mean / mean.norm().clamp(min=torch.finfo(mean.dtype).tiny), "F32")
        FREED.add(one.item.workspace)


def put(file: SideTensors, name: str, task: int, values: Tensor, dtype: str) -> None:
    """One task's share of a tensor."""
    import torch

    from pymerge.engine.generic import DTYPES
    from pymerge.ops.finite_cast import finite_cast

    stored, bad = finite_cast(values.float().contiguous(), DTYPES[dtype])
    if bad:
        raise Overflow(
            f"{safe_name(name)}: {int(bad)} value(s) of an expert do not fit {dtype}; largest {values.abs().max():.3g}"
        )
    raw = stored.cpu().reshape(-1).view(torch.uint8).numpy().data
    file.write(name, task * raw.nbytes, raw)
