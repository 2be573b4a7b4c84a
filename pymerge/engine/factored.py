"""Adapters merged by their factors: the update is left [m, k] times right [k, n] until it is added to the base."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint import AdaptedTensor, AnyTensor, safe_name
from pymerge.errors import NonFinite, RecipeError
from pymerge.methods.base import AdapterCombine, Factors, Notes, TaskGroup, TensorInfo
from pymerge.ops.delta_rule import DeltaRule
from pymerge.recipe import Steps

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.engine.check import Entry
    from pymerge.engine.piece import Piece
    from pymerge.engine.plan import Item, Plan

ROWS = 256  # of the output that are computed at once
SHARE = 3  # adapters whose ranks sum to more than the smaller side over this are merged as whole matrices


def weight_under(entry: Entry) -> AnyTensor | None:
    """The one weight that all task tensors are, or are adapters on; None where there is none."""
    under = {id(weight): weight for weight in map(_weight, entry.tuned)}
    if len(under) != 1 or not any(isinstance(tensor, AdaptedTensor) for tensor in entry.tuned):
        return None
    (weight,) = under.values()
    return weight if entry.base is None or entry.base is weight else None


def _weight(tensor: AnyTensor) -> AnyTensor:
    return tensor.weight if isinstance(tensor, AdaptedTensor) else tensor


def rank_sum(entry: Entry) -> int:
    return sum(tensor.rank for tensor in entry.tuned if isinstance(tensor, AdaptedTensor))


def by_factors(entry: Entry, rule: DeltaRule | None) -> bool:
    """Whether the tensor is merged by the factors of its adapters."""
    steps = entry.steps
    if steps is None or steps.purify or entry.split or entry.join or entry.weights or weight_under(entry) is None:
        return False
    if len(entry.shape) != 2 or entry.count != math.prod(entry.shape):
        return False
    if not all(step.on_cores for step in steps.calibrate):
        return False
    if isinstance(steps.combine, AdapterCombine):
        return True
    small = SHARE * rank_sum(entry) <= min(entry.shape)
    return small and (is_sum(rule) if rule is not None else steps.combine.on_cores)


def factored_item(item: Item, info: TensorInfo, room: int) -> Item | None:
    """The item, merged by the factors of its adapters; None where it is not, or is a sum that fits into `room` only in
    tiles. RecipeError where only factors would do."""
    entry, steps = item.entry, item.entry.steps
    assert steps is not None
    if by_factors(entry, item.rule):
        found = replace(item, workspace=workspace(steps, info, rank_sum(entry)), factored=True)
        return None if item.rule is not None and found.peak_bytes > room else found
    if isinstance(steps.combine, AdapterCombine):
        name = safe_name(entry.name)
        raise RecipeError(
            f"{name}: {steps.combine.name} merges LoRA adapters on one base, with no purify step, split or join. Is "
            "every model an adapter of the base? Where an adapter saved this matrix whole: "
            f'spectral: {{exclude: ["{name}"]}}'
        )
    return None


def is_sum(rule: DeltaRule) -> bool:
    """Whether a rule is a weighted sum."""
    picks = (rule.keep, rule.top, rule.skip, rule.elect, rule.gram_weights)
    return all(x is None for x in picks) and rule.norm == "none" and rule.rescale == "none"


def workspace(steps: Steps, info: TensorInfo, rank: int) -> int:
    """Bytes beside the weight and the output: factors twice in float64 and again with the update's, what steps take."""
    m, n = info.shape
    whole = (2 if steps.calibrate else 1) * (rank + 1)
    own = steps.combine.factor_workspace(info, rank) if isinstance(steps.combine, AdapterCombine) else 0
    core = replace(info, shape=(min(whole, m), min(whole, n)))
    taken = max((step.workspace(core) for step in steps.all if step.on_cores), default=0)
    return 8 * (m + n) * whole * 3 + own + taken + 8 * (info.tasks + 2) * whole**2 + 3 * 4 * ROWS * n


def factored_group(plan: Plan, item: Item) -> TaskGroup:
    """What steps are given: the factors of each task."""
    import torch

    entry, found = item.entry, []
    m, n = entry.shape
    for model, tensor in zip(entry.labels[1:], entry.tuned, strict=True):
        if not isinstance(tensor, AdaptedTensor):
            found.append(Factors(torch.zeros(m, 0), torch.zeros(0, n)))
            continue
        left, right = (side.float() for side in tensor.factors())
        if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
            raise NonFinite(f"{safe_name(entry.name)}: NaN or Inf in the adapter {model}. Nothing was written.")
        found.append(Factors(left, right))
    transposed = any(isinstance(tensor, AdaptedTensor) and tensor.transposed for tensor in entry.tuned)
    info = entry.info(plan.recipe.seed)
    return TaskGroup(info=info, base=None, tuned=(), factors=tuple(found), transposed=transposed)


def update_of(steps: Steps, group: TaskGroup, rule: DeltaRule | None) -> tuple[Factors, float]:
    """The merged update, and what it is still to be multiplied by."""
    factor = rule.scale if rule is not None else steps.combine.factor_of(group.info.name, False)
    group.notes.combine = steps.combine.name
    update = combined(steps, group, rule)
    if steps.calibrate:
        update, factor = calibrated(steps, group, Factors(update.left * factor, update.right)), 1.0
    group.notes.facts["factored"] = update.right.shape[0]
    return update, factor


def combined(steps: Steps, group: TaskGroup, rule: DeltaRule | None) -> Factors:
    """The update before `scale`."""
    import torch

    from pymerge.methods.cores import cores_of

    parts = group.factors
    assert parts is not None
    if rule is not None:
        weights = [w / rule.divisor for w in rule.weights]
        left = torch.cat([part.left * w for part, w in zip(parts, weights, strict=True)], dim=1)
        return Factors(left, torch.cat([part.right for part in parts]))
    combine = steps.combine
    if isinstance(combine, AdapterCombine):
        update = combine.combine_factors(oriented_factors(group))
        return Factors(update.right.mT, update.left.mT) if group.transposed else update
    found = cores_of(parts)
    notes = Notes(facts=group.notes.facts, combine=group.notes.combine)
    unscaled = replace(combine, scale=1.0) if hasattr(combine, "scale") else combine  # type: ignore[type-var]
    core = unscaled.combine(replace(group, factors=None, tuned=found.cores, notes=notes))
    if (basis := notes.basis) is not None:
        group.notes.basis = lambda: (found.left @ basis()[0].double(), found.right @ basis()[1].double())
    return found.factors(core)


def oriented_factors(group: TaskGroup) -> TaskGroup:
    """The group as [out, in]."""
    if not group.transposed or group.factors is None:
        return group
    turned = tuple(Factors(part.right.mT, part.left.mT) for part in group.factors)
    return replace(group, info=replace(group.info, shape=group.info.shape[::-1]), factors=turned)


def calibrated(steps: Steps, group: TaskGroup, update: Factors) -> Factors:
    from pymerge.methods.cores import cores_of

    assert group.factors is not None
    found = cores_of([*group.factors, update])
    *tasks, core = found.cores
    notes = Notes(facts=group.notes.facts, combine=group.notes.combine)
    if (basis := group.notes.basis) is not None:
        notes.basis = lambda: (found.left.mT @ basis()[0], found.right.mT @ basis()[1])
    view = replace(group, factors=None, tuned=tuple(tasks), notes=notes)
    for step in steps.calibrate:
        core = step.calibrate(core, view)
    return found.factors(core)


def merge_factored(
    plan: Plan, piece: Piece, weight: Sequence[Tensor], steps: Steps, rule: DeltaRule | None, store: Callable[..., None]
) -> dict[str, Any]:
    """The update added to the weight [m, n] (none: alone), a few rows at a time, in the piece's place. Returns the
    summary's facts."""
    entry = piece.item.entry
    group = factored_group(plan, piece.item)
    update, factor = update_of(steps, group, rule)
    share = 1.0
    if entry.base is None:  # whole weights are merged
        assert rule is not None
        share = rule.scale * math.fsum(rule.weights) / rule.divisor
    columns = entry.shape[1]
    for row in range(0, entry.shape[0], ROWS):
        merged = (update.left[row : row + ROWS] @ update.right).mul_(factor)
        for whole in weight:
            merged.add_(whole[row : row + ROWS].float(), alpha=share)
        store(plan, piece.part(row * columns, merged.numel()), merged)
    return dict(group.notes.facts)
