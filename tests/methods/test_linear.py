from __future__ import annotations

from typing import Any

import pytest
import torch

from pymerge.errors import RecipeError
from pymerge.methods.linear import Linear
from tests.methods.conftest import Merge


def test_weighted_average_in_float64_truth(merge: Merge, tensors: Any) -> None:
    _, tuned = tensors
    weights = (0.1, 0.7, 0.4)
    merged = merge(Linear(weight=weights), None, tuned)
    truth = sum(w * t.double() for w, t in zip(weights, tuned, strict=True)) / sum(weights)
    torch.testing.assert_close(merged.double(), truth, rtol=0, atol=4 * 2**-24 * float(truth.abs().max()))


def test_without_normalisation_it_is_the_sum(merge: Merge, tensors: Any) -> None:
    _, tuned = tensors
    assert torch.equal(merge(Linear(weight=(1, 1, 1), normalize=False), None, tuned), tuned[0] + tuned[1] + tuned[2])


def test_identical_models_return_the_model(merge: Merge, tensors: Any) -> None:
    _, tuned = tensors
    torch.testing.assert_close(merge(Linear(), None, [tuned[0]] * 2), tuned[0], rtol=0, atol=0)
    assert torch.equal(merge(Linear(weight=3.0), None, tuned[:1]), 3 * tuned[0] / 3)


@pytest.mark.parametrize("weight", [(1.0, -1.0), (0.0, 0.0), 0.0])
def test_weights_that_sum_to_zero(weight: Any) -> None:
    with pytest.raises(RecipeError, match="linear: weight: the weights sum to 0, which cannot be normalised"):
        Linear(weight=weight)
    assert Linear(weight=weight, normalize=False).normalize is False
