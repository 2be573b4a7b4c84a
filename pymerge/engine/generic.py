"""One parameter through any chain of steps, on torch tensors: spectral methods, other devices, models in memory.

Element-wise chains run by the same rule as the streamed merge and give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pymerge import _C
from pymerge.engine.non_finite import raise_bad_input, raise_overflow
from pymerge.engine.plan import Plan, element_wise
from pymerge.methods.base import ElementWiseCombine, TaskGroup, TensorInfo, chain_rule
from pymerge.ops.delta import merge_by_rule
from pymerge.ops.finite_cast import finite_cast
from pymerge.recipe import Steps

if TYPE_CHECKING:
    from pymerge.engine.execute import Piece

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def merge_group(steps: Steps, info: TensorInfo, base: Tensor | None, tuned: Sequence[Tensor]) -> Tensor:
    """The merged weight, float32. base is None where the combine step has none."""
    if element_wise(steps):
        assert isinstance(steps.combine, ElementWiseCombine)
        return merge_by_rule(chain_rule(steps.purify, steps.combine, info), base, tuple(tuned), add=base)
    group = TaskGroup(info=info, base=base, tuned=tuple(tuned))
    cleaner = group
    for step in steps.purify:
        cleaner = TaskGroup(info=info, base=None, tuned=step.purify(cleaner))
    update = steps.combine.combine(cleaner)
    for step in steps.calibrate:
        update = step.calibrate(update, group)
    return update if base is None else update + base.float()


def merge_generic(plan: Plan, piece: Piece, device: str) -> None:
    """Computes a whole tensor into the piece's output."""
    entry, relax = piece.item.entry, plan.recipe.relaxations
    assert entry.steps is not None
    if relax.get("nonfinite") != "keep" and any(_C.count_nonfinite(place, piece.count)[0] for place in piece.inputs):
        raise_bad_input(plan.recipe, piece)
    rows = piece.count // max(1, torch.Size(entry.shape[1:]).numel())
    shape = (rows, *entry.shape[1:]) if entry.shape else ()
    tensors = [
        torch.frombuffer(view, dtype=DTYPES[dtype]).reshape(shape).to(device)
        for view, (_, dtype) in zip(piece.input_views, piece.inputs, strict=True)
    ]
    base = tensors.pop(0) if entry.base is not None else None
    info = TensorInfo(name=entry.name, shape=shape, tasks=len(tensors), seed=plan.recipe.seed)
    merged = merge_group(entry.steps, info, base, tensors)
    result, bad = finite_cast(merged, DTYPES[entry.dtype])
    if bad and relax.get("overflow") == "clamp":
        limit = torch.finfo(DTYPES[entry.dtype]).max
        result, _ = finite_cast(merged.clamp(-limit, limit), DTYPES[entry.dtype])
    elif bad and relax.get("nonfinite") != "keep":
        raise_overflow(piece, int(bad), float(merged.abs().max()))
    out = torch.frombuffer(piece.out_view, dtype=DTYPES[entry.dtype])
    out.copy_(result.reshape(-1))
