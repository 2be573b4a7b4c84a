from __future__ import annotations

import math

import pytest

from pymerge.tuning.golden import golden_section, tries


@pytest.mark.parametrize("best", [0.0, 0.3, 0.831, 1.999, 2.0])
def test_brackets_the_maximum(best: float) -> None:
    tried: list[float] = []

    def score(x: float) -> float:
        tried.append(x)
        return -abs(x - best)

    low, high = golden_section(score, 0.0, 2.0, 0.01)
    assert high - low <= 0.01 and low - 1e-12 <= best <= high + 1e-12
    assert len(tried) == tries(0.0, 2.0, 0.01) == 14  # as the authors of ESM count them
    assert min(abs(x - best) for x in tried) < 0.01 and all(0 < x < 2 for x in tried)


def test_one_new_value_a_step() -> None:
    """Values divide the bracket in golden ratio, so that one of the two is inside the next bracket."""
    tried: list[float] = []
    golden_section(lambda x: tried.append(x) or -x, 0.0, 1.0, 0.1)
    share = (math.sqrt(5) - 1) / 2
    expected = [share**2, *(share**n for n in (1, 3, 4, 5, 6, 7))]
    assert tried == pytest.approx(expected)


def test_equal_scores_end_too() -> None:
    low, high = golden_section(lambda x: 1.0, -1.0, 1.0, 1e-3)
    assert low == -1.0 and high < -0.998
