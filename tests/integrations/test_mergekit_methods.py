"""SCE, NearSwap, Arcee Fusion, RAM and RAM+ against mergekit 0.1.5 itself where it is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge import methods
from pymerge.methods.base import Combine, TaskGroup, TensorInfo

api = pytest.importorskip("mergekit.merge_methods.api")

SHAPES = [(64, 48), (50,), (1, 30), (24, 1), (8, 5, 3, 3)]
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("sce", 1, {}),
    ("sce", 2, {"select_topk": 0.35}),
    ("sce", 5, {"select_topk": 0.35}),
    ("sce", 5, {"int8_mask": True}),
    ("nearswap", 1, {"t": 0.02}),
    ("nearswap", 1, {"t": 3.0}),
    ("ram", 1, {}),
    ("ram", 5, {"epsilon": 0.05}),
    ("ramplus_tl", 2, {}),
    ("ramplus_tl", 5, {"epsilon": 0.05, "r": 0.7, "alpha": 2.0}),
]


def models(shape: tuple[int, ...], tasks: int) -> list[Tensor]:
    """A base and models that leave a third of it unchanged."""
    g = torch.Generator().manual_seed(len(shape) + tasks)
    base, common = (torch.randn(shape, generator=g) for _ in range(2))
    changes = [0.02 * (t + 1) * (common + torch.randn(shape, generator=g)) for t in range(tasks)]
    return [base, *(base + change * (torch.rand(shape, generator=g) > 0.33) for change in changes)]


def ours(name: str, stack: list[Tensor], given: dict[str, Any]) -> Tensor:
    cls = methods.get(name)
    assert issubclass(cls, Combine)
    method = cls(**{key: value for key, value in given.items() if key not in cls.ignored})
    base, tuned = (None, stack) if method.base_role == "first" else (stack[0], stack[1:])
    info = TensorInfo(name="w", shape=tuple(stack[0].shape), tasks=len(tuned))
    merged = method.combine(TaskGroup(info=info, base=base, tuned=tuple(tuned)))
    return merged if base is None else merged + base


def theirs(name: str, stack: list[Tensor], given: dict[str, Any], dtype: torch.dtype) -> Tensor:
    return api.merge_tensors([t.clone() for t in stack], name, parameters=given, base_index=0, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "tasks", "given"), CASES)
def test_values(name: str, tasks: int, given: dict[str, Any], shape: tuple[int, ...]) -> None:
    stack = models(shape, tasks)
    torch.testing.assert_close(ours(name, stack, given), theirs(name, stack, given, torch.float32), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_arcee_fusion(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    stack = [t.to(dtype) for t in models(shape, 1)]
    merged = ours("arcee_fusion", stack, {})
    torch.testing.assert_close(merged.double(), theirs("arcee_fusion", stack, {}, torch.float64), rtol=0, atol=1e-12)
