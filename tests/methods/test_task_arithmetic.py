from __future__ import annotations

from typing import Any

import torch

from pymerge.methods.task_arithmetic import TaskArithmetic
from tests.methods.conftest import Merge


def test_sum_of_scaled_task_vectors(merge: Merge, tensors: Any) -> None:
    base, tuned = tensors
    weights = (1.0, -0.5, 0.25)
    merged = merge(TaskArithmetic(weight=weights, scale=0.7), base, tuned)
    update = sum(w * (t.double() - base.double()) for w, t in zip(weights, tuned, strict=True))
    torch.testing.assert_close(merged.double(), base.double() + 0.7 * update, rtol=0, atol=1e-6)


def test_normalised_weights_average(merge: Merge, tensors: Any) -> None:
    base, tuned = tensors
    merged = merge(TaskArithmetic(weight=0.5, normalize=True, scale=1), base, tuned)
    torch.testing.assert_close(merged, torch.stack(tuned).mean(0), rtol=0, atol=1e-6)


def test_defaults_of_the_styles() -> None:
    assert TaskArithmetic().scale == 0.3 and TaskArithmetic(style="mergekit", weight=1.0).scale == 1.0
