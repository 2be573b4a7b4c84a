"""Methods that pymerge computes in another way than mergekit, against mergekit 0.1.5 itself where it is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge import methods
from pymerge.methods.base import Combine, TaskGroup, TensorInfo

api = pytest.importorskip("mergekit.merge_methods.api")

SHAPES = [(64, 48), (50,), (1, 30), (24, 1), (8, 5, 3, 3)]
GRAM_METHODS: list[tuple[str, int, bool, dict[str, Any]]] = [
    ("nuslerp", 2, True, {"weight": (0.7, 0.2)}),
    ("nuslerp", 2, False, {"weight": (0.7, 0.2)}),
    ("nuslerp", 2, True, {"weight": (1.0, -1.0)}),
    ("nuslerp", 2, True, {"weight": (0.3, 0.5), "nuslerp_flatten": False}),
    ("nuslerp", 2, True, {"weight": (0.3, 0.5), "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("nuslerp", 2, False, {"weight": (0.3, 0.5), "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("multislerp", 2, False, {"weight": (0.7, 0.2)}),
    ("multislerp", 5, True, {"weight": (0.1, 0.2, 0.3, 0.4, 0.7)}),
    ("multislerp", 5, True, {"weight": (0.1, 0.2, 0.3, 0.4, 0.7), "normalize_weights": False}),
    ("multislerp", 3, True, {"weight": (0.1, 0.2, 0.3), "eps": 0.05}),
    ("multislerp", 1, True, {"weight": (0.3,), "normalize_weights": False}),
    ("karcher", 1, False, {}),
    ("karcher", 2, False, {}),
    ("karcher", 5, False, {"max_iter": 3, "tol": 1e-7}),
    ("model_stock", 2, True, {}),
    ("model_stock", 5, True, {}),
    ("model_stock", 2, True, {"filter_wise": True}),
    ("model_stock", 5, True, {"filter_wise": True}),
]


def models(shape: tuple[int, ...], tasks: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A base and task vectors that have something in common; the smallest is far smaller than the base."""
    g = torch.Generator().manual_seed(seed)
    base, common = (torch.randn(shape, generator=g) for _ in range(2))
    return base, [base + 0.02 * (t + 1) * (common + torch.randn(shape, generator=g)) for t in range(tasks)]


def theirs(name: str, base: Tensor | None, tuned: list[Tensor], dtype: torch.dtype, given: dict[str, Any]) -> Tensor:
    """mergekit's merged delta, float64: less the base where there is one."""
    parameters = {
        "lambda" if key == "scale" else key: list(v) if isinstance(v, tuple) else v for key, v in given.items()
    }
    if base is None:
        return api.merge_tensors(tuned, name, parameters=parameters, dtype=dtype).double()
    merged = api.merge_tensors([base, *tuned], name, parameters=parameters, base_index=0, dtype=dtype)
    return merged.double() - base.double()


def ours(name: str, base: Tensor | None, tuned: list[Tensor], given: dict[str, Any], tensor: str = "w") -> Tensor:
    cls = methods.get(name)
    assert issubclass(cls, Combine)
    style = {"style": "mergekit"} if any(p.name == "style" for p in methods.describe(name).parameters) else {}
    info = TensorInfo(name=tensor, shape=tuple(tuned[0].shape), tasks=len(tuned))
    return cls(**style, **given).combine(TaskGroup(info=info, base=base, tuned=tuple(tuned))).double()


def relative(mine: Tensor, other: Tensor) -> float:
    return float(torch.linalg.vector_norm(mine - other) / torch.linalg.vector_norm(other))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "tasks", "with_base", "given"), GRAM_METHODS)
def test_coefficients_from_the_gram_matrix(
    name: str, tasks: int, with_base: bool, given: dict[str, Any], shape: tuple[int, ...]
) -> None:
    base, tuned = models(shape, tasks)
    mine = ours(name, base if with_base else None, tuned, given)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 2e-7)):
        assert relative(mine, theirs(name, base if with_base else None, tuned, dtype, given)) <= bound, dtype


@pytest.mark.parametrize("name", ["nuslerp", "model_stock"])
def test_rows_without_an_update_stay(name: str) -> None:
    base, tuned = models((6, 40), 2)
    for t in tuned:
        t[2] = base[2]
    tuned[0][4] = base[4]
    given = {"filter_wise": True} if name == "model_stock" else {"weight": (0.4, 0.8), "nuslerp_flatten": False}
    other = theirs(name, base, tuned, torch.float64, given)
    assert relative(ours(name, base, tuned, given), other) <= 2e-7 and not other[2].any()


@pytest.mark.parametrize("size", [1e-3, 1e-5])
def test_model_stock_of_small_updates(size: float) -> None:
    """mergekit's floor under the product of two norms is reached."""
    base, tuned = models((6, 40), 3)
    zero, tuned = torch.zeros_like(base), [size * (t - base) for t in tuned]
    given = {"filter_wise": True}
    assert (
        relative(ours("model_stock", zero, tuned, given), theirs("model_stock", zero, tuned, torch.float64, given))
        <= 2e-7
    )


DELLA = [{"density": 0.4, "epsilon": 0.2}, {"density": 0.7, "epsilon": 0.25}, {"density": 0.5, "epsilon": 0.0}]


@pytest.mark.parametrize("shape", [(150, 400), (60_000,), (20, 100, 6, 5)], ids=str)
@pytest.mark.parametrize("given", DELLA)
def test_della_keeps_the_same_share_of_each_decile(given: dict[str, Any], shape: tuple[int, ...]) -> None:
    delta = models(shape, 1)[1][0]
    zero, arguments = torch.zeros_like(delta), {"weight": (1.0,), "rescale": False, **given}
    torch.manual_seed(4321)
    rows = delta.reshape(1, -1) if delta.dim() < 2 else delta
    rank = rows.abs().argsort(dim=1).argsort(dim=1).double() / (rows.shape[1] - 1)
    expected = given["density"] - given["epsilon"] + 2 * given["epsilon"] * rank
    for kept in (
        ours("della_linear", zero, [delta], arguments),
        theirs("della_linear", zero, [delta], torch.float32, arguments),
    ):
        kept = kept.reshape(rows.shape)
        assert torch.equal(kept[kept != 0], rows.double()[kept != 0])
        for decile in range(10):
            inside = (rank >= decile / 10) & (rank <= (decile + 1) / 10)
            count, mean = int(inside.sum()), float(expected[inside].mean())
            assert abs(float((kept[inside] != 0).double().mean()) - mean) <= 5 * (mean * (1 - mean) / count) ** 0.5


@pytest.mark.parametrize("name", ["della", "della_linear"])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_della_merges_have_the_same_size(name: str, rescale: bool, normalize: bool) -> None:
    base, tuned = models((200, 300), 3)
    given = {"weight": (0.5, 1.0, 0.7), "density": (0.4, 0.6, 1.0), "epsilon": (0.1, 0.3, 0.15), "scale": 0.8}
    given |= {"rescale": rescale, "normalize": normalize}
    torch.manual_seed(4321)
    mine, other = ours(name, base, tuned, given), theirs(name, base, tuned, torch.float32, given)
    spread = float(mine.square().sum().sqrt())
    assert abs(float(mine.abs().sum() - other.abs().sum())) <= 5 * spread
    signed = float((mine - other).sum())
    assert abs(signed) <= 5 * 2**0.5 * spread


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_della_that_drops_nothing(name: str) -> None:
    base, tuned = models((20, 30), 3)
    given = {"weight": (0.5, -1.0, 0.7), "scale": 0.8}
    assert relative(ours(name, base, tuned, given), theirs(name, base, tuned, torch.float32, given)) <= 1e-5
