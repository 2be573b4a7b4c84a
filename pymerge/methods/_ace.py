"""ACE on one weight matrix: the pass that decides, the solve, the refinement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pymerge.errors import NonFinite
from pymerge.linalg import mean_singular_value, polar, subspace
from pymerge.methods._ace_solve import System, solve
from pymerge.methods.base import TaskGroup

if TYPE_CHECKING:
    from pymerge.methods.ace import Ace

TINY = 1e-12  # of the authors' code, wherever it takes a logarithm or divides (src/merge/strategy.py)
RELEASED_EPS, PAPER_EPS = 1e-2, 1e-5
LARGEST_RELATIVE_RIDGE = 0.1  # eps mean(1/trace) beyond which the refinement opposes the tasks (specification, 7.3)
NO_TRACE = 1e-20  # share of the largest trace below which a task has no update
SAME_ROWS = 1e-13  # share of a task's energy below which what is left by centring is rounding
SMALLEST_RIDGE = 1e-14  # share of the mean trace below which a ridge is lost in float64
LARGEST_NORM = 2.0**20  # larger updates are scaled, so that products of three stay in the range of float32
ROWS = 256  # that are widened to float64 at a time


@dataclass(frozen=True)
class Updates:
    """What one pass over the task vectors D_t finds."""

    energy: list[float]  # |D_t|^2
    trace: list[float]  # |D_t - column means|^2
    mean: list[Tensor]  # column means, float64 [n]
    total: Tensor  # sum of D_t, float32 [m, n]


def merge_matrix(method: Ace, group: TaskGroup) -> Tensor:
    """The update of `Ace` on one matrix; fills in group.notes.facts."""
    if group.tuned[0].numel() == 0:
        return torch.zeros_like(group.tuned[0], dtype=torch.float32)
    updates = read_updates(group)
    kept = _tasks_with_update(method, updates)
    facts = group.notes.facts
    facts["skipped"] = [t for t in range(len(updates.trace)) if t not in kept]
    result = _merged(method, group, updates, kept) if kept else torch.zeros_like(updates.total)
    if method.keep_mean == "average":
        result += torch.stack(updates.mean).mean(0).float()
    facts["cosine"] = _cosine(result, updates.total)
    return result.mul_(method.scale)


def read_updates(group: TaskGroup) -> Updates:
    """One pass, sums in float64."""
    found = Updates([], [], [], torch.zeros_like(group.tuned[0], dtype=torch.float32))
    m = group.tuned[0].shape[0]
    for t in range(len(group.tuned)):
        d = group.delta(t)
        energy, sums = 0.0, torch.zeros(d.shape[1], dtype=torch.float64, device=d.device)
        for rows in d.split(ROWS):
            wide = rows.double()
            energy += float(wide.reshape(-1) @ wide.reshape(-1))
            sums += wide.sum(0)
        if not math.isfinite(energy):
            raise NonFinite(f"ace: {group.info.name}: the update of task {t} has NaN or infinite entries")
        mean = sums / m
        found.energy.append(energy)
        found.trace.append(max(0.0, energy - m * float(mean @ mean)))
        found.mean.append(mean)
        found.total.add_(d)
    return found


def _tasks_with_update(method: Ace, updates: Updates) -> list[int]:
    tasks = range(len(updates.trace))
    if method.preset == "released":
        return list(tasks)
    floor = NO_TRACE * max(updates.trace)
    return [t for t in tasks if updates.trace[t] > max(floor, SAME_ROWS * updates.energy[t])]


def _gate(method: Ace, energies: list[float], facts: dict) -> bool:
    """Whether the energies count as unequal."""
    logs = torch.tensor([math.log(e + TINY) for e in energies], dtype=torch.float64)
    gamma = float(logs.var()) if len(energies) > 1 else 0.0
    if method.gate != "var_log":
        gamma /= float(logs.mean()) ** 2 + TINY
    facts["gamma"] = gamma
    unequal = gamma > method.tau if method.gate in ("released", "var_log") else method.gate == "heterogeneous"
    facts["branch"] = "heterogeneous" if unequal else "homogeneous"
    return unequal


def _eps(method: Ace, trace: list[float], weight: list[float], facts: dict) -> float:
    eps = method.eps or (RELEASED_EPS if method.preset == "released" else PAPER_EPS)
    smallest = SMALLEST_RIDGE * math.fsum(w * x for w, x in zip(weight, trace, strict=True)) / math.fsum(weight)
    if eps < smallest:
        facts["eps"] = smallest
    return max(eps, smallest)


def _merged(method: Ace, group: TaskGroup, updates: Updates, kept: list[int]) -> Tensor:
    """The update before `scale`, of the tasks in `kept`."""
    facts = group.notes.facts
    energy, trace = [updates.energy[t] for t in kept], [updates.trace[t] + TINY for t in kept]
    unequal = _gate(method, energy, facts)
    norm = math.sqrt(max(energy))
    unit = 1.0 if norm < LARGEST_NORM else 2.0 ** math.frexp(norm)[1]
    weight = [1.0 / x if unequal else 1.0 for x in trace]
    eps = _eps(method, trace, weight, facts)
    facts["ebar"] = eps * math.fsum(1.0 / x for x in trace) / len(trace)
    refined = unequal and _refines(method, facts)
    mean_energy = math.fsum(updates.energy) / len(updates.energy)
    total = updates.total
    for t in facts["skipped"]:
        total = total - updates.mean[t].float()  # all that such a task has
    system = System(
        group=group,
        tasks=kept,
        unit=unit,
        weight=[w * unit**2 if unequal else 1.0 for w in weight],
        ridge=[eps * w if unequal else eps / unit**2 for w in weight],
        mean=[updates.mean[t] / unit for t in kept],
        total=total / unit if unit != 1.0 else total,
        prior=None if method.prior == "none" else 1.0 / (mean_energy + TINY) if unequal else 1.0,
        center=method.center,
        residual=refined,
    )
    found = solve(system)
    facts.update(route=found.route, precision=found.precision, condition=found.condition)
    x = found.x.float()
    if found.residual is not None:
        k = max(1, int(method.k_frac * min(group.info.shape)))
        x += _isotropic(found.x + found.residual.to(found.x.dtype), k, facts)
    return x.mul_(unit) if unit != 1.0 else x


def _refines(method: Ace, facts: dict) -> bool:
    always = method.refine == "always" or (method.refine is None and method.preset == "released")
    if method.refine == "never":
        facts["refinement"] = "off"
    elif not always and facts["ebar"] > LARGEST_RELATIVE_RIDGE:
        facts["refinement"] = "skipped: ebar"
    else:
        facts["refinement"] = "added"
    return facts["refinement"] == "added"


def _isotropic(f: Tensor, k: int, facts: dict) -> Tensor:
    """sigma sum of u_i v_i^T over the top k singular directions of f [m, n], sigma the mean of their values. From the
    subspace alone: with Q an orthonormal basis of the u_i, the sum is Q polar(Q^T f). A core f has fewer
    rows: the values beyond count as zeros."""
    f = f.float()
    turned = f.shape[0] > f.shape[1]
    wide = f.mT if turned else f
    here = min(k, wide.shape[0])
    basis = subspace(wide, here)  # [min(m, n), k]
    part = basis.mT @ wide
    factor = polar(part).factor
    sigma = float(mean_singular_value(factor, part)) * here / k
    facts.update(k=k, sigma=sigma)
    result = (basis @ factor).mul_(sigma)
    return result.mT if turned else result


def _cosine(a: Tensor, b: Tensor) -> float:
    dot, norms = 0.0, [0.0, 0.0]
    for x, y in zip(a.split(ROWS), b.split(ROWS), strict=True):
        x, y = x.double().reshape(-1), y.double().reshape(-1)
        dot += float(x @ y)
        norms = [norms[0] + float(x @ x), norms[1] + float(y @ y)]
    return dot / math.sqrt(norms[0] * norms[1]) if min(norms) > 0.0 else 0.0
