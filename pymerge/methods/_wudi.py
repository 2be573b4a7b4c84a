"""WUDI's interference as a quadratic function whose matrices are computed once, and Adam on it.

L(M) = <M G, M> - 2 <M, P> + const with G = sum_t D_t^T D_t / ||D_t||^2 and P = sum_t D_t D_t^T D_t / ||D_t||^2: a step
is one product M G where the definition takes 2 T of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pymerge.methods.base import TaskGroup

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # Adam's defaults


def squares(a: Tensor) -> float:
    """||a||^2 in float64, some rows at a time."""
    return sum(float(x.double().square().sum()) for x in a.split(256))


def inner(a: Tensor, b: Tensor) -> float:
    """<a, b> in float64, some rows at a time."""
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a.split(256), b.split(256), strict=True))


class Interference:
    """L of one group: start = sum_t D_t and target = P, both [m, n] float32, skipped tasks (D_t = 0), constant.

    form   "gram": G [n, n] is kept, m n^2 multiply-adds a product; "factors": the D_t / ||D_t|| are, 2 T m^2 n, taken
           where that is less
    """

    def __init__(self, group: TaskGroup) -> None:
        m, n = group.tuned[0].shape
        like = torch.zeros(m, n, device=group.tuned[0].device)
        self.start, self.target, self.constant = like, torch.zeros_like(like), 0.0
        self.skipped: list[int] = []
        self.form = "factors" if 2 * len(group.tuned) * m < n else "gram"
        self.factors: list[Tensor] = []
        self.gram = like.new_zeros(n, n) if self.form == "gram" else like.new_zeros(0, 0)
        for t in range(len(group.tuned)):
            self._add(group.delta(t), t)

    def _add(self, delta: Tensor, task: int) -> None:
        size = squares(delta) ** 0.5
        if size == 0.0:
            self.skipped.append(task)
            return
        self.start += delta
        unit = delta / size
        if unit.shape[0] < unit.shape[1]:
            small = unit @ unit.mT
            self.target.addmm_(small, delta)
        else:
            small = unit.mT @ unit
            self.target.addmm_(delta, small)
        self.constant += squares(small) * size**2
        if self.form == "factors":
            self.factors.append(unit)
        elif unit.shape[0] < unit.shape[1]:
            self.gram.addmm_(unit.mT, unit)
        else:
            self.gram += small

    def half_gradient(self, m: Tensor, out: Tensor) -> Tensor:
        """M G - P."""
        if self.form == "gram":
            return torch.addmm(self.target, m, self.gram, beta=-1, out=out)
        torch.neg(self.target, out=out)
        for unit in self.factors:
            out.addmm_(m @ unit.mT, unit)
        return out

    def loss(self, m: Tensor, half_gradient: Tensor) -> float:
        return inner(m, half_gradient) - inner(m, self.target) + self.constant


def adam(problem: Interference, lr: float, steps: int) -> tuple[Tensor, list[float]]:
    """M [m, n] after `steps` steps (Kingma and Ba, arXiv 1412.6980, algorithm 1) and L before and after. Overwrites
    problem.start; the states are float32."""
    m = problem.start
    half, denominator = torch.empty_like(m), torch.empty_like(m)
    mean, square = torch.zeros_like(m), torch.zeros_like(m)
    losses = []
    for step in range(1, steps + 1):
        problem.half_gradient(m, half)
        if step == 1:
            losses.append(problem.loss(m, half))
        correction = (1 - BETA2**step) ** 0.5
        mean.lerp_(half, 1 - BETA1)
        square.mul_(BETA2).addcmul_(half, half, value=1 - BETA2)
        torch.sqrt(square, out=denominator).add_(EPS / 2 * correction)  # of half the gradient: half of eps
        m.addcdiv_(mean, denominator, value=-lr * correction / (1 - BETA1**step))
    losses.append(problem.loss(m, problem.half_gradient(m, half)))
    return m, losses
