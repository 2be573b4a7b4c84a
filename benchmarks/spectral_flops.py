"""Floating-point operations of the spectral methods: what a frugal implementation of each formula needs.

A multiplication and an addition are two operations; a Gram matrix counts half of its product, a symmetric
eigenproblem 9 k^3, Cholesky k^3 / 3, a triangular solve n^2 a right-hand side. Lower-order terms are left out, and so
is the choice between float32 and float64 (at half the rate): shares of the float32 peak are lower bounds.
"""

from __future__ import annotations

from collections.abc import Callable

WUDI_STEPS = 300


def tsv_m(m: int, n: int, tasks: int) -> float:
    """A Gram matrix, its eigenvectors and the other side's vectors a task; two polar factors by Gram matrices."""
    k, long = min(m, n), max(m, n)
    a_task = k * k * long + 9 * k**3 + 2 * long * k * (k // tasks)
    kept = k // tasks * tasks
    polar = kept * kept * (m + n) + 18 * kept**3
    return tasks * a_task + polar + 2 * kept * kept * n + 2 * m * n * kept


def iso_c(m: int, n: int, tasks: int) -> float:
    """One polar factor by the Gram matrix of the sum."""
    k, long = min(m, n), max(m, n)
    return k * k * long + 9 * k**3 + 2 * k**3 + 2 * k * k * long


def iso_cts(m: int, n: int, tasks: int, fraction: float = 0.8) -> float:
    """The singular vectors of the sum and of each task outside them, and two polar factors."""
    k, long = min(m, n), max(m, n)
    common = int(k * fraction)
    own = (k - common) // tasks
    vectors = k * k * long + 9 * k**3
    outside = tasks * (4 * m * n * common + vectors + 2 * long * k * own)
    return vectors + 2 * long * k * common + outside + k * k * (m + n) + 18 * k**3 + 2 * k * k * n + 2 * m * n * k


def svc(m: int, n: int, tasks: int) -> float:
    """One side's singular vectors of the update, responses of the update and each task along them, the update again."""
    k, long = min(m, n), max(m, n)
    return k * k * long + 9 * k**3 + (tasks + 1) * 2 * m * n * k + 2 * m * n * k


def ace(m: int, n: int, tasks: int) -> float:
    """The homogeneous branch: D (D^T D + e I) a task, then one Cholesky factorisation with m right-hand sides; where
    T m <= n in the small form of T m rows."""
    if tasks * m <= n:
        rows = tasks * m
        return rows * rows * n + rows**3 / 3 + 2 * m * rows * rows + 2 * m * rows * n
    product = 3 * m * n * min(m, n)
    return tasks * product + (n * n * m * tasks if m < n else 0) + n**3 / 3 + 2 * m * n * n


def wudi(m: int, n: int, tasks: int) -> float:
    """Gram matrices and D D^T D a task once, one product of [m, n] and [n, n] a step."""
    return tasks * 3 * m * n * n + WUDI_STEPS * 2 * m * n * n


FLOPS: dict[str, Callable[[int, int, int], float]] = {
    "tsv_m": tsv_m,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "svc": svc,
    "ace": ace,
    "wudi": wudi,
}


def spectral_flops(method: str, shapes: list[tuple[int, ...]], tasks: int) -> float | None:
    """Over all matrices; None for methods that are not counted here."""
    count = FLOPS.get(method)
    return None if count is None else float(sum(count(*shape, tasks) for shape in shapes if len(shape) == 2))
