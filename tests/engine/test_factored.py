"""Adapters merged by their factors give what their whole weights give, and never make a whole task vector."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pymerge
from pymerge.checkpoint.adapted import AdaptedTensor
from pymerge.errors import NonFinite, RecipeError
from pymerge.methods.base import AdapterCombine
from tests.adapters import SHAPES, TARGETS, adapted, random_factors, write_adapter
from tests.models import random_tensors, read_model, write_model

MATRICES = {f"{module}.weight": SHAPES[f"{module}.weight"] for module in TARGETS}
TASKS = 2
METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weight": [0.7, 0.4]},
    "tsv_m": {},
    "iso_c": {"scale": 1.5},
    "ace": {},
    "ace-heterogeneous": {"gate": "heterogeneous", "refine": "always"},
    "ace-not-centred": {"gate": "homogeneous", "center": False},
    "ace-mean": {"gate": "homogeneous", "keep_mean": "average"},
    "task_arithmetic+svc": {"calibrate": "svc"},
    "tsv_m+svc": {"calibrate": "svc"},
    "iso_c+svc": {"calibrate": "svc"},
    "ace+lines": {"calibrate": "lines"},
}


@pytest.fixture
def problem(tmp_path: Path) -> tuple[Path, list[Path], list[dict[str, Tensor]]]:
    """A base, adapters of it (one of which leaves a matrix alone), and their factors."""
    base = write_model(tmp_path / "base", random_tensors(0, SHAPES, scale=0.05))
    factors = [random_factors(t + 1, MATRICES, rank=3 + t) for t in range(TASKS)]
    del factors[1][f"{TARGETS[0]}.lora_A.weight"], factors[1][f"{TARGETS[0]}.lora_B.weight"]
    return base, [write_adapter(tmp_path / f"adapter{t}", f, base) for t, f in enumerate(factors)], factors


@pytest.fixture
def no_whole_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(self: AdaptedTensor, view: memoryview, start: int = 0) -> None:
        raise AssertionError(f"{self.name} was made whole")

    monkeypatch.setattr(AdaptedTensor, "read_into", refuse)
    yield


@pytest.mark.parametrize("case", list(METHODS))
@pytest.mark.usefixtures("no_whole_weights")
def test_equals_the_merge_of_whole_weights(case: str, problem: Any, tmp_path: Path) -> None:
    """In float64, where stored weights hide nothing of the updates."""
    base, adapters, factors = problem
    method = case.split("+")[0].split("-")[0]
    pymerge.merge(base, adapters, method=method, out=tmp_path / "out", **METHODS[case])
    found, start = read_model(tmp_path / "out"), read_model(base)
    zero = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    whole = [adapted(zero, f, dtype=torch.float32) for f in factors]
    expected = pymerge.merge(zero, whole, method=method, **METHODS[case])
    for name in start:
        update = found[name].double() - start[name].double()
        size = max(1e-3, float(expected[name].double().norm()))
        assert float((update - expected[name].double()).norm()) <= 2e-5 * size, name
    summary = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert {n for n, facts in summary["per_tensor"].items() if "factored" in facts} == set(MATRICES)


@pytest.mark.usefixtures("no_whole_weights")
def test_linear_averages_models_without_a_base(problem: Any, tmp_path: Path) -> None:
    base, adapters, factors = problem
    pymerge.merge(None, adapters, method="linear", weight=[1, 3], normalize=False, out=tmp_path / "out")
    models = [adapted(read_model(base), f) for f in factors]
    for name, tensor in read_model(tmp_path / "out").items():
        expected = models[0][name] + 3 * models[1][name]
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("no_whole_weights")
def test_conv1d_is_merged_as_out_in(tmp_path: Path) -> None:
    a = [torch.randn(3, 30) for _ in range(2)]
    b = [torch.randn(50, 3) for _ in range(2)]
    merged = {}
    for turned in (False, True):
        folder = tmp_path / str(turned)
        base = write_model(folder / "base", {"h.0.c_fc.weight": torch.zeros((30, 50) if turned else (50, 30))})
        named = [{"h.0.c_fc.lora_A.weight": x, "h.0.c_fc.lora_B.weight": y} for x, y in zip(a, b, strict=True)]
        adapters = [write_adapter(folder / f"a{t}", f, base, fan_in_fan_out=turned) for t, f in enumerate(named)]
        for method in ("knots", "core_space"):
            out = folder / method
            pymerge.merge(base, adapters, method=method, out=out)
            found = read_model(out)["h.0.c_fc.weight"]
            merged[method, turned] = found.T if turned else found
    for method in ("knots", "core_space"):
        torch.testing.assert_close(merged[method, True], merged[method, False], rtol=1e-4, atol=1e-5)


def knots_of_whole(deltas: list[Tensor], density: float) -> Tensor:
    """KnOTS of one matrix by its definition, without a scale."""
    u, s, vh = torch.linalg.svd(torch.cat(deltas, 1).double(), full_matrices=False)
    kept = int((s > 1e-5).sum())
    blocks = torch.stack((s[:kept, None] * vh[:kept]).split([d.shape[1] for d in deltas], 1))
    count = blocks[0].numel() - int(density * blocks[0].numel())
    theta = blocks.abs().flatten(1).kthvalue(count, dim=1).values
    trimmed = torch.where(blocks.abs() >= theta[:, None, None], blocks, 0.0)
    agrees = (trimmed * trimmed.sum(0).sign()) > 0
    return u[:, :kept] @ ((trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1))


def test_knots_of_one_matrix_is_its_definition(problem: Any, tmp_path: Path) -> None:
    base, adapters, factors = problem
    pymerge.merge(base, adapters, method="knots", scope="tensor", scale=1.0, out=tmp_path / "out")
    start, found = read_model(base), read_model(tmp_path / "out")
    name = f"{TARGETS[1]}.weight"
    deltas = [adapted(start, f)[name] - start[name].double() for f in factors]
    update = found[name].double() - start[name].double()
    torch.testing.assert_close(update, knots_of_whole(deltas, 0.2), rtol=0, atol=1e-6)


def test_adapter_methods_refuse_what_is_no_adapter(problem: Any, tmp_path: Path) -> None:
    base, adapters, factors = problem
    whole = write_model(tmp_path / "whole", adapted(read_model(base), factors[0], dtype=torch.float32))
    name = f"{TARGETS[0]}.weight"
    cases: list[tuple[list[Path], dict[str, Any]]] = [
        ([adapters[0], whole], {}),
        (adapters, {"purify": {"method": "dare", "density": 0.5}}),
        (adapters, {"split": {name: 2}}),
    ]
    for models, options in cases:
        for method in ("knots", "core_space"):
            with pytest.raises(RecipeError, match="merges LoRA adapters on one base"):
                pymerge.merge(base, models, method=method, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_sums_go_in_tiles_where_memory_is_short(problem: Any) -> None:
    from pymerge.engine.local import plan_merge
    from pymerge.engine.plan import SMALLEST_ARENA, Options

    base, adapters, _ = problem
    recipe = pymerge.Recipe.from_kwargs(base, adapters, "task_arithmetic")
    plan = plan_merge(recipe, Options(memory=SMALLEST_ARENA + (48 << 20)))
    assert sum(item.factored for item in plan.items) == len(MATRICES)
    assert sum(item.read_bytes for item in plan.items) == sum(4 * t.numel() for t in read_model(base).values())


def test_bad_factors_name_the_adapter(problem: Any, tmp_path: Path) -> None:
    base, adapters, factors = problem
    factors[1][f"{TARGETS[1]}.lora_B.weight"][2, 1] = float("nan")
    write_adapter(adapters[1], factors[1], base)
    with pytest.raises(NonFinite, match=r"up_proj.weight: NaN or Inf in the adapter .*adapter1"):
        pymerge.merge(base, adapters, method="tsv_m", out=tmp_path / "out")


def test_search_over_the_scale_has_the_bits_of_the_merge(problem: Any, tmp_path: Path) -> None:
    from pymerge.engine.scaled import merge_scaled, merge_update

    base, adapters, _ = problem
    recipes = [pymerge.Recipe.from_kwargs(base, adapters, "tsv_m", scale=scale) for scale in (1.0, 0.37)]
    merge_update(recipes[0], tmp_path / "update")
    merge_scaled(recipes[1], tmp_path / "update", tmp_path / "scaled")
    recipes[1].run(tmp_path / "merged")
    one, other = read_model(tmp_path / "scaled"), read_model(tmp_path / "merged")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_registered() -> None:
    for name in ("knots", "core_space"):
        assert issubclass(pymerge.methods.get(name), AdapterCombine)
