"""The mathematics of Iso-CTS: polar(U) polar(V)^T of the stacked common and task-specific singular vectors, from a
polar factor of the sum, its smallest singular directions and systems of the size of the task-specific part.

Let the sum of the task vectors have the c leading triplets U_c, V_c. The task-specific left vectors A come from
D_t - U_c U_c^T D_t and are orthogonal to U_c, so polar([A, U_c]) = [polar(A), U_c]. The right ones B are not: the Gram
matrix of [B, V_c] is 1 plus a part of rank 2 q, q the number of columns of B, whose eigenvectors lie in the span of
the columns of B and of V_c V_c^T B. With Q an orthonormal basis of the latter's coordinates,

    polar(U) polar(V)^T = R - U_Q V_Q^T + [polar(A), U_Q] G^(-1/2) [B, V_Q]^T,    G the Gram matrix of [B, V_Q],

where R = U_c V_c^T, U_Q = U_c Q, V_Q = V_c Q. R is the sum's polar factor less its smallest directions; neither U_c nor
V_c is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pymerge.linalg import Polar, _dense, mean_singular_value, polar, tail_subspace
from pymerge.methods import _spectral as sp
from pymerge.ops.gram64 import gram64

COUPLING = 1e-5  # cosines between B and V_c below this are dropped: float32 does not give their directions


@dataclass(frozen=True)
class Common:
    """R = U_c V_c^T [m, n] of the sum; tail: an orthonormal basis of what U_c leaves of the smaller side's space
    [min(m, n), p]; values: sum of the c singular values; rank: c, or the rank of the sum where that is smaller; angle:
    the sine of what rounding errors may then have turned U_c by."""

    product: Tensor
    tail: Tensor
    values: float
    rank: int
    angle: float = 0.0


def common_space(total: Tensor, count: int, tol: float) -> Common:
    """The `count` leading directions of `total`, fewer where its rank (singular values above tol * s_1) is smaller."""
    m, n = total.shape
    if tol >= 1.0:
        total, tol = torch.zeros_like(total), sp.RESOLUTION
    found = polar(total, tol)
    product, rank = found.factor, min(count, int(found.rank))
    values = float(mean_singular_value(product, total)) * min(m, n)
    angle = tol * float(found.condition) if rank < count else 0.0
    if rank == min(m, n):
        return Common(product, total.new_empty(rank, 0), values, rank)
    tail = tail_subspace(total if m <= n else total.mT, min(m, n) - rank)
    if m <= n:
        other = tail.mT @ product  # [p, n]: rows are the right singular vectors, or zeros
        values -= float((other.double() * (tail.mT @ total).double()).sum())
        product = product.addmm_(tail, other, alpha=-1)
    else:
        other = product @ tail  # [m, p]
        values -= float((other.double() * (total @ tail).double()).sum())
        product = product.addmm_(other, tail.mT, alpha=-1)
    return Common(product, tail, values, rank, angle)


def outside(delta: Tensor, common: Common, count: int, noise: float | None) -> sp.Triplets:
    """Top triplets of D_t - U_c U_c^T D_t, less those up to `noise`. Overwrites delta."""
    m, n = common.product.shape
    if m <= n:  # the left vectors lie in the tail's span
        found = sp.top_triplets(common.tail.mT @ delta, count, noise)
        return found._replace(left=common.tail @ found.left)
    return sp.top_triplets(delta.addmm_(common.product, common.product.mT @ delta, alpha=-1), count, noise)


def stacks(parts: Sequence[sp.Triplets], keep_all: bool) -> tuple[Polar, Tensor, float]:
    """polar(A) [m, q], B [n, q] and the tolerance for stacks that B is part of."""
    tol = sp.stack_tolerance(parts, keep_all)
    return sp.polar_of_stack([p.left for p in parts], tol), torch.cat([p.right for p in parts], dim=1), tol


def stacked_product(common: Common, left: Tensor, right: Tensor, tol: float) -> tuple[Tensor, float]:
    """polar([A, U_c]) polar([B, V_c])^T [m, n], given left = polar(A) [m, q] and right = B [n, q]; and the condition of
    [B, V_c]. Directions of [B, V_c] below tol of the largest are left out."""
    both = common.product  # R
    image = both @ right  # U_c V_c^T B [m, q]
    coupling, turn = _dense.eigh(gram64(image))  # squared cosines of B with V_c
    kept = coupling > COUPLING**2
    first = (image.double() @ (turn[:, kept] * coupling[kept].rsqrt())).to(image.dtype)
    first = torch.linalg.qr(both @ (both.mT @ first)).Q  # U_Q [m, k]: small cosines' rounding is not in U_c's span
    second = both.mT @ first  # V_Q [n, k]
    block = torch.cat([right, second], dim=1)
    values, vectors = _dense.eigh(gram64(block))
    largest = float(values[-1].clamp(min=1.0))
    keep = values > max(tol, sp.RESOLUTION / 10) ** 2 * largest
    root = (vectors[:, keep] * values[keep].rsqrt()) @ vectors[:, keep].mT  # G^(-1/2)
    turned = (block.double() @ root).to(image.dtype)  # [n, q + k]
    # Rounding leaves B and V_Q with parts in the rest of V_c's span; the root enlarged them by up to the condition.
    turned -= both.mT @ (both @ turned) - second @ (second.mT @ turned)
    merged = torch.addmm(both, first, second.mT, alpha=-1)
    condition = (largest / float(values[keep].min().clamp(max=1.0))) ** 0.5
    return merged.addmm_(torch.cat([left, first], dim=1), turned.mT), condition


def stacked_directions(
    base: Tensor | None, tuned: Sequence[Tensor], rank: int, left: Tensor, right: Tensor, tol: float
) -> tuple[Tensor, Tensor]:
    """polar([A, U_c]) [m, k] and polar([B, V_c]) [n, k], k = q + rank; the arguments are those of `stacked_product`."""
    u, v = sp.directions_of_sum(base, tuned, rank)
    return torch.cat([left, u], dim=1), sp.polar_of_stack([right, v], tol).factor
