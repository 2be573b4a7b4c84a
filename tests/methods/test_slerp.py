from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.methods.slerp import Slerp, SlerpWeights
from tests.methods.conftest import Merge


def slerp_truth(t: float, a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double(), b.double()
    theta = torch.arccos((a / a.norm()).flatten() @ (b / b.norm()).flatten())
    return (torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b) / torch.sin(theta)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_great_circle_of_unnormalised_ends(t: float, merge: Merge) -> None:
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(17, 31, generator=g), 3 * torch.randn(17, 31, generator=g)
    torch.testing.assert_close(merge(Slerp(t=t), None, [a, b]).double(), slerp_truth(t, a, b), rtol=0, atol=2e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_nearly_parallel_ends_are_interpolated_linearly(sign: int, merge: Merge, tensors: Any) -> None:
    base, tuned = tensors
    other = sign * (base + 0.01 * (tuned[0] - base))
    merged = merge(Slerp(t=0.3), None, [base, other])
    torch.testing.assert_close(merged, 0.7 * base + 0.3 * other, rtol=0, atol=1e-6)


def test_threshold_of_the_fallback() -> None:
    def gram(cosine: float) -> list[list[float]]:
        return [[4.0, 2 * cosine], [2 * cosine, 1.0]]

    rule_weights = SlerpWeights(0.5)
    assert rule_weights(gram(0.99951)) == (0.5, 0.5)
    theta = math.acos(0.9994)
    assert rule_weights(gram(0.9994)) == pytest.approx((math.sin(theta / 2) / math.sin(theta),) * 2, abs=1e-15)


def test_a_zero_end_counts_as_orthogonal(merge: Merge, tensors: Any) -> None:
    base = tensors[0]
    merged = merge(Slerp(t=0.5), None, [base, torch.zeros_like(base)])
    torch.testing.assert_close(merged, math.sin(math.pi / 4) * base, rtol=0, atol=1e-6)


def test_identical_ends(merge: Merge, tensors: Any) -> None:
    base = tensors[0]
    torch.testing.assert_close(merge(Slerp(t=0.3), None, [base, base]), base, rtol=0, atol=1e-6)
