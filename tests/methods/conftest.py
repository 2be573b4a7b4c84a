from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from pymerge.methods.base import Combine, ElementWiseCombine, Purify, TaskGroup, TensorInfo, chain_rule, merges_by_rule
from pymerge.ops.delta import merge_by_rule

Merge = Callable[..., Tensor]


@pytest.fixture
def merge() -> Merge:
    """merge(method, base, tuned, purify=(), name="w", seed=0): the merged weight."""

    def run(
        method: Combine,
        base: Tensor | None,
        tuned: Sequence[Tensor],
        purify: Sequence[Purify] = (),
        name: str = "w",
        seed: int = 0,
    ) -> Tensor:
        info = TensorInfo(name=name, shape=tuple(tuned[0].shape), tasks=len(tuned), seed=seed)
        base = base if method.subtracts(base is not None) else None
        if merges_by_rule(purify, method):
            assert isinstance(method, ElementWiseCombine)
            return merge_by_rule(chain_rule(purify, method, info), base, tuned, add=base)
        group = TaskGroup(info=info, base=base, tuned=tuple(tuned))
        for step in purify:
            group = TaskGroup(info=info, base=None, tuned=step.purify(group))
        update = method.combine(group)
        return update if base is None else update + base.float()

    return run


@pytest.fixture
def tensors() -> tuple[Tensor, list[Tensor]]:
    """A base and three fine-tuned tensors, 33 x 65."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(33, 65, generator=g)
    return base, [base + 0.1 * torch.randn(33, 65, generator=g) for _ in range(3)]
