"""Any chain of steps on torch tensors: spectral methods, other devices, steps that are no rule.

Element-wise chains run by the same rule as the streamed merge and give the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pymerge import _C
from pymerge.checkpoint import safe_name
from pymerge.engine.asking import rule_part
from pymerge.engine.factored import factored_group, merge_factored, oriented_factors
from pymerge.engine.lanes import DTYPES, Host
from pymerge.engine.non_finite import raise_bad_input, raise_overflow
from pymerge.engine.plan import Plan
from pymerge.engine.survey import Tile
from pymerge.errors import NumericError
from pymerge.methods.base import Method, Notes, Purify, TaskGroup
from pymerge.methods.surveyed import SurveyedCombine, SurveyedPurify
from pymerge.ops.delta import merge_by_rule
from pymerge.ops.delta_rule import DeltaRule
from pymerge.ops.finite_cast import finite_cast
from pymerge.recipe import Steps

if TYPE_CHECKING:
    from pymerge.engine.lanes import Place
    from pymerge.engine.piece import Piece

_here = threading.local()  # numeric threads that were set in this thread


@contextmanager
def threads_of_numerics(count: int) -> Iterator[None]:
    """BLAS libraries use `count` threads, and torch in the thread that is here; other threads: see `use_threads`."""
    import scipy.linalg.cython_lapack  # noqa: F401  only libraries that are loaded are limited, and `linalg` calls this one
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(limits=count, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


def use_threads(count: int) -> None:
    """Numeric threads of torch in this thread. OpenMP and MKL keep the number thread by thread, and a new thread starts
    with all processors: threads side by side would wait for each other at every product."""
    if getattr(_here, "count", None) != count:
        torch.set_num_threads(count)
        _here.count = count


def merge_group(steps: Steps, group: TaskGroup, rule: DeltaRule | None, adds: bool) -> Tensor:
    """The merged weight, float32. rule: of the element-wise steps up to combine, behind those that are no rule;
    model-wide questions are answered. adds: whether the base is added; False: the merged update."""
    base = group.base if adds else None
    if rule is not None and not rule_part(steps)[0] and not steps.calibrate:
        return merge_by_rule(rule, group.base, group.tuned, add=base)
    if rule is not None:
        seen = purified(rule_part(steps)[0], group)
        update = merge_by_rule(rule, seen.base, seen.tuned)
    else:
        update = combined(steps, group)
    group.notes.combine = steps.combine.name
    for step in steps.calibrate:
        update = step.calibrate(update, group)
    return update if base is None else update.add_(base.float())


def purified(steps: Sequence[Purify], group: TaskGroup) -> TaskGroup:
    """What the step behind these sees."""
    for step in steps:
        view = oriented(step, group)
        tuned = step.purify(view)
        if view is not group:
            tuned = tuple(t.mT.contiguous() for t in tuned)
        group = replace(group, base=None, tuned=tuned)
    return group


def purified_parts(steps: Sequence[Purify], group: TaskGroup, split: tuple[int, tuple[int, ...]] | None) -> TaskGroup:
    """As `purified`, of a matrix that is merged in parts: the whole again."""
    if split is None:
        return purified(steps, group)
    parts = [purified(steps, part).tuned for part in parts_of(group, split)]
    return replace(group, base=None, tuned=tuple(torch.cat(t, split[0]) for t in zip(*parts, strict=True)))


def oriented(step: Method, group: TaskGroup) -> TaskGroup:
    """The group as a step sees it: what needs inputs gets matrices as [out, in], however they are stored."""
    if not (group.transposed and "covariance" in step.needs):
        return group
    base = None if group.base is None else group.base.mT
    info = replace(group.info, shape=group.info.shape[::-1])
    return replace(group, info=info, base=base, tuned=tuple(t.mT for t in group.tuned), transposed=False)


def combined(steps: Steps, group: TaskGroup) -> Tensor:
    """The merged update."""
    seen = purified(steps.purify, group)
    view = oriented(steps.combine, seen)
    update = steps.combine.combine(view)
    return update if view is seen else update.mT.contiguous()


def merge_parts(
    steps: Steps, group: TaskGroup, rule: DeltaRule | None, split: tuple[int, tuple[int, ...]] | None, adds: bool
) -> Tensor:
    """As merge_group; a matrix with a split is merged part by part."""
    if split is None:
        return merge_group(steps, group, rule, adds)
    merged, facts = [], []
    for part in parts_of(group, split):
        merged.append(merge_group(steps, part, rule, adds))
        facts.append(part.notes.facts)
    group.notes.facts["parts"] = facts
    return torch.cat(merged, split[0])


def parts_of(group: TaskGroup, split: tuple[int, tuple[int, ...]] | None) -> Iterator[TaskGroup]:
    """The parts that a matrix is merged in, each with notes of its own; without a split the matrix."""
    if split is None:
        yield group
        return
    dim, sizes = split
    bases = group.base.split(sizes, dim) if group.base is not None else (None,) * len(sizes)
    columns = [t.split(sizes, dim) for t in group.tuned]
    weights = [t.split(sizes, dim) for t in group.weights or ()]
    for i, base in enumerate(bases):
        tuned = tuple(parts[i] for parts in columns)
        info = replace(group.info, name=f"{group.info.name}[{i}]", shape=tuple(tuned[0].shape))
        shares = tuple(w[i] for w in weights) or None
        yield replace(group, info=info, base=base, tuned=tuned, weights=shares, notes=Notes())


def merge_generic(
    plan: Plan, pieces: Sequence[Piece], steps: Steps, rule: DeltaRule | None, place: Place | None = None
) -> dict[str, Any]:
    """Computes the pieces' outputs; several pieces are matrices that are merged as one, below each other. Returns what
    the steps note for the summary.

    steps  those of the pieces, with every model-wide question answered
    place  where they are computed; None: the CPU"""
    entry, place = pieces[0].item.entry, place or Host()
    put = partial(store, place=place)
    if pieces[0].item.factored:
        return merge_factored(plan, pieces[0], load(plan, pieces[0], place), steps, rule, put)
    loaded = [load(plan, piece, place) for piece in pieces]
    group = group_of(plan, pieces, loaded)
    try:
        merged = merge_parts(steps, group, rule, pieces[0].item.split, entry.adds)
    except NumericError as error:
        raise NumericError(f"{safe_name(group.info.name)}: {error}") from error
    facts = dict(group.notes.facts)
    if len(pieces) > 1:
        facts["joined"] = [piece.item.entry.name for piece in pieces]
    at = 0
    for piece, inputs in zip(pieces, loaded, strict=True):
        rows = inputs[-1].shape[0] if len(pieces) > 1 else 0
        put(plan, piece, merged[at : at + rows] if rows else merged)
        at += rows
    return facts


def survey_pieces(
    plan: Plan, pieces: Sequence[Piece], place: Place | None, steps: Steps, combine: SurveyedCombine
) -> Any:
    """What a combine step with a question finds in what `merge_generic` merges, behind the purify steps."""
    if pieces[0].item.factored:
        use_threads(plan.item_threads)
        return combine.survey(oriented_factors(factored_group(plan, pieces[0].item)))
    group = group_of(plan, pieces, [load(plan, piece, place or Host()) for piece in pieces])
    seen = (oriented(combine, purified(steps.purify, part)) for part in parts_of(group, pieces[0].item.split))
    try:
        return reduce(combine.join, (on_host(combine.survey(part)) for part in seen))
    except NumericError as error:
        raise NumericError(f"{safe_name(group.info.name)}: {error}") from error


def survey_matrix(plan: Plan, pieces: Sequence[Piece], place: Place | None, step: SurveyedPurify) -> list[Any]:
    """What a purify step with a question finds in a matrix (the pieces, one below the other), part by part."""
    group = group_of(plan, pieces, [load(plan, piece, place or Host()) for piece in pieces])
    return [on_host(step.survey(oriented(step, part))) for part in parts_of(group, pieces[0].item.split)]


def tile_behind(plan: Plan, piece: Piece, steps: Steps) -> tuple[Tile, list[Tensor]]:
    """What the rule behind the purify steps that are no rule is asked about, and the tensors that hold it."""
    group = group_of(plan, [piece], [load(plan, piece, Host())])
    found = purified_parts(rule_part(steps)[0], group, piece.item.split)
    tensors = [t.contiguous() for t in found.tuned]
    assert piece.item.rule is not None
    tile = Tile(
        base=None,
        tuned=[(t.data_ptr(), "F32") for t in tensors],
        count=piece.count,
        index0=piece.first,
        number=piece.number,
        rule=piece.item.rule,
    )
    return tile, tensors


def group_of(plan: Plan, pieces: Sequence[Piece], loaded: Sequence[Sequence[Tensor]]) -> TaskGroup:
    item, entry = pieces[0].item, pieces[0].item.entry
    tensors = list(loaded[0]) if len(pieces) == 1 else [torch.cat(rows) for rows in zip(*loaded, strict=True)]
    base = tensors.pop(0) if entry.base is not None else None
    tasks = len(entry.tuned)
    info = item.info(plan.recipe.seed)
    if len(pieces) > 1:
        info = replace(info, shape=tuple(tensors[0].shape))
    weights = tuple(tensors[tasks:]) or None
    return TaskGroup(
        info=info,
        base=base,
        tuned=tuple(tensors[:tasks]),
        first=pieces[0].first - (item.first if item.part is not None else 0),
        weights=weights,
        inputs=entry.inputs or None,
        transposed=entry.transposed,
    )


def on_host(answer: Any) -> Any:
    """An answer that can be joined with those from other devices."""
    if isinstance(answer, Tensor):
        return answer.cpu()
    return type(answer)(map(on_host, answer)) if type(answer) in (tuple, list) else answer


def load(plan: Plan, piece: Piece, place: Place) -> list[Tensor]:
    """The piece's inputs where it is computed, base first; views of the arena on the CPU. What follows is numerics."""
    use_threads(plan.item_threads)
    if plan.recipe.relaxations.get("nonfinite") != "keep":
        if any(_C.count_nonfinite(place, piece.count)[0] for place in piece.inputs):
            raise_bad_input(piece)
    shape = piece.item.shape
    row = torch.Size(shape[1:]).numel()
    if piece.count < piece.item.count:
        shape = (piece.count // row, *shape[1:]) if row and piece.count % row == 0 else (piece.count,)
    return [tensor.reshape(shape) for tensor in place.inputs(piece)]


def store(plan: Plan, piece: Piece, merged: Tensor, place: Place) -> None:
    """Rounds to the output dtype; raises where a value overflows."""
    entry, relax = piece.item.entry, plan.recipe.relaxations
    result, bad = finite_cast(merged, DTYPES[entry.dtype])
    if bad and relax.get("overflow") == "clamp":
        limit = torch.finfo(DTYPES[entry.dtype]).max
        result, _ = finite_cast(merged.clamp(-limit, limit), DTYPES[entry.dtype])
    elif bad and relax.get("nonfinite") != "keep":
        raise_overflow(piece, int(bad), float(merged.abs().max()))
    place.put(piece, result)
