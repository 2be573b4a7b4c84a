"""What a step computes on one tensor, in units whose rates are measured: for estimates of time, not for decisions.

A multiplication and an addition are two operations. A factorisation counts as the product operations that take as long
(Cholesky runs at some 0.4 of the rate of products), so that one measured rate a precision is enough. Routes that depend
on values (the rank of an update, the condition of a system) are counted as for updates of full rank.
"""

from __future__ import annotations

from typing import NamedTuple

SMALLEST = 256  # `linalg.polar` takes float64 eigenvectors below this
HALLEY_SHARE = 4  # a stack of singular vectors has the condition that its Halley steps want from this shape on
ITERATED, ITERATED_SHARE = 1024, 16  # `linalg.truncated_svd` iterates from this side on, for such a share of it
CHOLESKY = 2.5  # operations of products that take as long as one of a Cholesky factorisation


class Work(NamedTuple):
    """single, double: operations of float32 and float64 products; eigen: of float64 symmetric eigensolvers (see
    `eigen`); touched: bytes that plain tensor operations read and write."""

    single: float = 0.0
    double: float = 0.0
    eigen: float = 0.0
    touched: float = 0.0

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: float) -> Work:
        return Work(*(count * value for value in self))

    @property
    def flops(self) -> float:
        return self.single + self.double + self.eigen


NOTHING = Work()


def passes(entries: float, count: float) -> Work:
    """Tensor operations on float32 entries, each a read and a write."""
    return Work(touched=8.0 * count * entries)


def eigen(k: int, share: float = 1.0, *, single: bool = False) -> Work:
    """A symmetric eigenproblem of side k, of which a share of the vectors is wanted: 9 k^3 for all, 45 % of it for
    none; and what small ones cost more (fitted to sides of 256 to 1536). float32 takes half as long."""
    return Work(eigen=(9.0 * k**3 * (0.45 + 0.55 * share) + 1500.0 * k**2) / (2 if single else 1))


def gram(side: int, other: int) -> Work:
    """One triangle of a float64 Gram matrix [side, side]."""
    return Work(double=float(side) ** 2 * other)


def cholesky_solve(n: int, right: int) -> Work:
    """A Cholesky factorisation [n, n] and `right` right-hand sides: in units of either precision, here float64."""
    return Work(double=CHOLESKY * n**3 / 3 + 2.0 * right * n**2)


def truncated(m: int, n: int, rank: int) -> Work:
    """`linalg.truncated_svd`: a Gram matrix, its eigenvectors, the other side's vectors; or a dozen steps of iteration
    where few of many triplets are wanted."""
    r, long = min(m, n), max(m, n)
    if r > ITERATED and rank * ITERATED_SHARE <= r:
        return Work(single=48.0 * r * long * max(2 * rank, rank + 16))
    return gram(r, long) + eigen(r, rank / max(1, r)) + Work(double=2.0 * r * long * rank)


def polar(m: int, n: int, *, decaying: bool = False) -> Work:
    """`linalg.polar` of a float32 matrix of full rank on the CPU; decaying: its singular values, as those of sums of
    task vectors, not of stacked singular vectors."""
    long, n = max(m, n), min(m, n)
    if n < SMALLEST:
        return gram(n, long) + eigen(n) + Work(double=2.0 * n**3, single=2.0 * long * n**2)
    if decaying:
        return gram(n, long) + eigen(n) + Work(double=2.0 * long * n**2, single=5.0 * long * n**2 + 2.0 * n**3)
    if long >= HALLEY_SHARE * n:
        return Work(single=3.3 * long * n**2 + 6.0 * n**3)
    return Work(single=6.5 * long * n**2 + 2.0 * n**3) + eigen(n, single=True)
