"""The mathematics of ESM on one matrix: essential directions of each task, their stacks whitened and multiplied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from pymerge.linalg import Polar, covariance_subspace, mean_singular_value, polar, truncated_svd
from pymerge.linalg.packed import packed_covariance_subspace
from pymerge.methods import _spectral as sp
from pymerge.methods.base import LayerInput, TaskGroup

if TYPE_CHECKING:
    from pymerge.methods.esm import Settings


class Directions(NamedTuple):
    """basis [m, r] orthonormal float32, values float64 [r] descending, up to a common factor."""

    basis: Tensor
    values: Tensor


class Part(NamedTuple):
    """One task: left [m, r] and right [r, n] blocks of the stacks, and the task's norm."""

    left: Tensor
    right: Tensor
    norm: float


def merged_update(group: TaskGroup, settings: Settings) -> Tensor:
    """float32 [m, n], without the layer's factor and `scale`."""
    if group.tuned[0].numel() == 0:
        return torch.zeros(group.tuned[0].shape, device=group.tuned[0].device)
    if group.inputs is not None:
        return by_directions(group, group.inputs, settings)
    group.notes.facts["statistics"] = "none"
    if settings.other_2d == "mean":
        return sp.sum_of_deltas(group.base, group.tuned, float(len(group.tuned)))
    return by_svd(group, settings)


def by_directions(group: TaskGroup, inputs: tuple[LayerInput, ...], settings: Settings) -> Tensor:
    m, n = group.tuned[0].shape
    tasks, facts = len(group.tuned), group.notes.facts
    count = settings.rank_of(m, tasks)
    rows = [seen.rows for seen in inputs]
    parts = [task_part(group.delta(t), inputs[t], rows[t], count, settings) for t in range(tasks)]
    facts["rank"], facts["ranks"] = count, [p.left.shape[1] for p in parts]
    for key, found in (
        ("skipped_tasks", [t for t, p in enumerate(parts) if p.left.shape[1] == 0]),
        ("few_rows", [t for t in range(tasks) if rows[t] < 2 * count]),
    ):
        if found:
            facts[key] = found
    scale_tasks(parts, settings.task_power)
    left = torch.cat([p.left for p in parts], dim=1)
    right = torch.cat([p.right for p in parts])
    del parts
    if left.shape[1] == 0:
        return left.new_zeros(m, n)
    scale_columns(right, settings.dim_power)
    left_size, left_polar = whitened(left, min(m, tasks * count), settings.polar_tol)
    del left
    right_size, right_polar = whitened(right, min(n, tasks * count), settings.polar_tol)
    del right
    note_polars(group, left_polar, right_polar)
    return (left_polar.factor @ right_polar.factor).mul_(settings.gain * left_size * right_size)


def task_part(delta: Tensor, seen: LayerInput, rows: int, count: int, settings: Settings) -> Part:
    """Weighted directions and coordinates of one task. delta [m, n] float32."""
    m = delta.shape[0]
    norm = norm64(delta)
    padded = settings.task_norm == "released" and rows < m
    found = leading_directions(delta, seen, rows, max(count, rows) if padded else count)
    weights = direction_weights(found.values[:count], count, settings.eig_power, settings.lam_tol)
    kept = len(weights)
    coordinates = found.basis.mT @ delta  # [r, n]
    if padded:
        norm = float((norm64(coordinates) ** 2 + norm64(delta[rows:]) ** 2) ** 0.5)
    coordinates = coordinates[:kept]
    if settings.task_norm == "truncated":
        norm = norm64(coordinates)
    w = weights.float()
    return Part(found.basis[:, :kept] * w, coordinates * w[:, None], norm)


def leading_directions(
    delta: Tensor, seen: LayerInput, rows: int, count: int, mode: Literal["exact", "fast"] = "exact"
) -> Directions:
    """Top eigenvectors of D G D^T, at most as many as its rank can be: from the rows X of G = X^T X where there are
    some (in N or m dimensions, whichever is less), else from G (in m or n; `mode` as in `covariance_subspace`)."""
    top = float(delta.abs().amax())
    count = min(count, rows, *delta.shape)
    samples = seen.samples
    if samples is not None:
        samples = samples.to(delta.device, torch.float32)
        count = min(count, samples.shape[0])
    if top == 0.0 or count == 0:
        return Directions(delta[:, :0], delta.new_empty(0, dtype=torch.float64))
    triangle = seen.triangle
    if triangle is not None and delta.device.type == "cpu":
        return Directions(*packed_covariance_subspace(delta, triangle, count, mode=mode))
    if samples is None:
        gram = seen.second_moment(torch.float64).to(delta.device)
        return Directions(*covariance_subspace(delta, gram, count, mode=mode))
    largest = float(samples.abs().amax())
    if largest == 0.0:
        return Directions(delta[:, :0], delta.new_empty(0, dtype=torch.float64))
    outputs = (delta / top) @ (samples / largest).mT  # [m, N]
    found = truncated_svd(outputs, count)
    return Directions(found.U, found.S.double().square())


def expert(base: Tensor, tuned: Tensor, seen: LayerInput, rank: int) -> tuple[Tensor, Tensor]:
    """B [m, r] orthonormal, A = B^T R [r, n], R = tuned - base: the part of R that moves the outputs most; float32.

    r is less than `rank` where there are fewer rows or the residual is 0."""
    residual = tuned.float() - base.float()
    basis = leading_directions(residual, seen, seen.rows, rank, mode="fast").basis
    return basis, basis.mT @ residual


def direction_weights(values: Tensor, count: int, power: float, tol: float) -> Tensor:
    """w of the directions that are kept, float64 [r]: (lambda / mean)^power, then of mean 1; means over all `count`."""
    if len(values) == 0 or float(values[0]) <= 0.0:
        return values[:0]
    values = values[values > tol * values[0]]
    weights = (values * (count / values.sum())) ** power
    return weights * (count / weights.sum())


def scale_tasks(parts: list[Part], power: float) -> None:
    """Coordinates of each task by (norm / mean norm)^power, in place."""
    mean = sum(p.norm for p in parts) / len(parts)
    for p in parts:
        if power and p.norm > 0.0:
            p.right.mul_((p.norm / mean) ** power)


def scale_columns(right: Tensor, power: float) -> None:
    """Columns by (norm / mean norm)^power, in place."""
    if not power:
        return
    norms = torch.linalg.vector_norm(right, dim=0, dtype=torch.float64)
    mean = float(norms.mean())
    if mean > 0.0:
        right.mul_(((norms / mean) ** power).float())


def whitened(a: Tensor, size: int, tol: float) -> tuple[float, Polar]:
    """sum(s) / size over the singular values above tol, and the polar factor."""
    found = polar(a, tol)
    return float(mean_singular_value(found.factor, a)) * (min(a.shape) / size), found


def by_svd(group: TaskGroup, settings: Settings) -> Tensor:
    """TSV-M, one direction a task at least; preset "roberta": times the mean singular values of both stacks."""
    m, n = group.tuned[0].shape
    tasks = len(group.tuned)
    count = max(1, min(m, n) // tasks)
    errors, parts = sp.stored_errors(group), []
    for t in range(tasks):
        delta = group.delta(t)
        parts.append(sp.top_triplets(delta, count, sp.noise_level(sp.spread(delta), errors[t])))
    sp.note_ranks(group, parts)
    values = torch.cat([p.s for p in parts])
    if len(values) == 0:
        return torch.zeros(m, n, device=values.device)
    tol = sp.stack_tolerance(parts, keep_all=False)
    stacks = [torch.cat([getattr(p, side) for p in parts], dim=1) for side in ("left", "right")]
    (left_size, left), (right_size, right) = (
        whitened(stack, min(stack.shape[0], tasks * count), tol) for stack in stacks
    )
    note_polars(group, left, right)
    scale = 1.0 if settings.vision else left_size * right_size
    return (left.factor * (values * scale)) @ right.factor.mT


def note_polars(group: TaskGroup, left: Polar, right: Polar) -> None:
    group.notes.facts["polar_ranks"] = [int(left.rank), int(right.rank)]
    group.notes.facts["condition"] = [float(left.condition), float(right.condition)]


def norm64(a: Tensor) -> float:
    return float(torch.linalg.vector_norm(a, dtype=torch.float64))
