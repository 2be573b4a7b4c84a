"""Experts of ESM++: against the released results, and what must hold whatever the numbers (specification, 13)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pymerge
from pymerge.methods._esm import expert
from pymerge.methods.esmpp import EsmPlusPlus
from pymerge.runtime import esmpp
from tests.golden.cases import FOLDER, Golden, read_golden
from tests.methods.esm_problems import of_covariance, of_rows, problem
from tests.methods.moments import relative
from tests.methods.test_esm_golden import statistics_of
from tests.models import write_model

BOUND = 1e-4
PATH = FOLDER / "esm" / "case07_esmpp_t3_rank4.safetensors"


@pytest.fixture(scope="module", params=[of_rows, of_covariance], ids=["rows", "covariance"])
def released(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Golden, dict[str, Tensor], Path]:
    """The golden case, its tensors, and the folder of a merge that leaves the base as it is (scale 0)."""
    golden, tensors, folder = read_golden(PATH), load_file(PATH), tmp_path_factory.mktemp("esmpp")
    base = write_model(folder / "base", golden.base)
    tuned = [write_model(folder / f"task{t}", task) for t, task in enumerate(golden.tasks)]
    statistics = []
    for t in range(len(tuned)):
        acts = {k.removeprefix(f"acts/task{t}/"): x for k, x in tensors.items() if k.startswith(f"acts/task{t}/")}
        statistics.append(folder / f"task{t}.stats.safetensors")
        statistics_of(acts, request.param).save(statistics[-1])
    given = {"scale": 0.0, "expert_rank": golden.params["rank"]}
    pymerge.merge(base, tuned, method="esmpp", statistics=statistics, out=folder / "out", **given)
    return golden, tensors, folder / "out"


def test_released_experts_and_prototypes(released: tuple[Golden, dict[str, Tensor], Path]) -> None:
    golden, tensors, folder = released
    experts = load_file(folder / esmpp.EXPERTS)
    assert {key.removesuffix(".A") for key in experts if key.endswith(".A")} == set(golden.params["routed_keys"])
    for name in golden.params["routed_keys"]:
        module = name.removesuffix(".weight").removesuffix(".in_proj_weight")
        for t in range(len(golden.tasks)):
            found = experts[f"{name}.B"][t] @ experts[f"{name}.A"][t]
            assert relative(found, tensors[f"expected/expert_delta/task{t}/{name}"]) <= BOUND
            mean = tensors[f"expected/prototype/task{t}/{module}"]
            assert relative(experts[f"{name}.prototypes"][t], mean / mean.norm()) <= BOUND


def test_released_routes_and_outputs(released: tuple[Golden, dict[str, Tensor], Path]) -> None:
    golden, tensors, folder = released
    model = nn.Module()
    for name, weight in golden.base.items():
        *path, leaf = name.removesuffix(".weight").removesuffix(".in_proj_weight").split(".")
        fused = name.endswith("in_proj_weight")
        layer = nn.MultiheadAttention(weight.shape[1], 2) if fused else nn.Linear(*weight.shape[::-1], bias=False)
        inner = model
        for part in path:
            if not hasattr(inner, part):
                setattr(inner, part, nn.Module())
            inner = getattr(inner, part)
        setattr(inner, leaf, layer)
        if fused:  # twice the width, not three times: only its shape is asked for here
            layer.in_proj_weight = nn.Parameter(weight)
        else:
            layer.weight = nn.Parameter(weight)
    esmpp.attach(model, folder)
    for key in [key for key in tensors if key.startswith("input/")]:
        module = key.removeprefix("input/")
        output = model.get_submodule(module)(tensors[key]).detach()
        assert relative(output, tensors[f"expected/output/{module}"]) <= BOUND
        assert torch.equal(esmpp.routes(model)[f"{module}.weight"], tensors[f"expected/route/{module}"])


@pytest.mark.parametrize("how", [of_rows, of_covariance], ids=["rows", "covariance"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=str)
def test_experts_are_the_part_that_moves_the_outputs(how: Any, shape: tuple[int, int]) -> None:
    p = problem(*shape, 1, rows=90)
    base, residual, x = torch.randn(shape, generator=torch.Generator().manual_seed(5)), p.deltas[0], p.samples[0]
    for rank in (1, 5, min(shape)):
        left, right = expert(base, base + residual.float(), how(x), rank)
        assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
        torch.testing.assert_close(left.mT @ left, torch.eye(rank), rtol=0, atol=1e-6)
        values = torch.linalg.svdvals(x @ residual.mT)
        lost = x @ (residual - left.double() @ right.double()).mT
        torch.testing.assert_close(lost.norm(), values[rank:].norm(), rtol=1e-4, atol=1e-4 * float(values[0]))


@pytest.mark.parametrize("how", [of_rows, of_covariance], ids=["rows", "covariance"])
@pytest.mark.parametrize(("m", "n", "rank"), [(40, 24, 7), (24, 40, 7), (24, 24, 24)])
def test_with_the_rank_of_the_residual_nothing_is_lost(how: Any, m: int, n: int, rank: int) -> None:
    p = problem(m, n, 1, rows=90, rank=rank)
    residual, base = p.deltas[0].float(), torch.zeros(m, n)
    left, right = expert(base, base + residual, how(p.samples[0]), rank)
    assert relative(left @ right, residual) < 1e-5
    if rank > 1:
        left, right = expert(base, base + residual, how(p.samples[0]), rank - 1)
        assert relative(left @ right, residual) > 1e-3


def test_experts_of_large_matrices_are_iterated_on() -> None:
    """Beyond 1024 few directions are found by iteration: as good as the exact ones for what they are cut off at."""
    g = torch.Generator().manual_seed(0)
    residual = torch.randn(1100, 1200, generator=g) * torch.logspace(0, -1.5, 1200)
    x = torch.randn(2000, 1200, generator=g) * torch.logspace(0, -1, 1200).flip(0)
    left, right = expert(torch.zeros_like(residual), residual, of_covariance(x), 16)
    torch.testing.assert_close(left.mT @ left, torch.eye(16), rtol=0, atol=1e-5)
    outputs = (x @ residual.mT).double()
    best = torch.linalg.svdvals(outputs)[16:].norm()
    assert float((outputs - x.double() @ (left @ right).double().mT).norm() / best) < 1.0005


def test_no_residual_and_few_rows() -> None:
    p = problem(24, 20, 1, rows=3)
    residual, base = p.deltas[0].float(), torch.ones(24, 20)
    assert expert(base, base, of_rows(p.samples[0]), 4)[0].shape == (24, 0)
    left, right = expert(base, base + residual, of_rows(p.samples[0]), 4)
    assert left.shape == (24, 3)
    seen = p.samples[0].float() @ residual.mT
    torch.testing.assert_close(p.samples[0].float() @ (left @ right).mT, seen, rtol=1e-3, atol=1e-4)


def test_which_matrices_get_experts() -> None:
    method = EsmPlusPlus()
    vision, text = "vit.encoder.layer.0.", "bert.encoder.layer.0."
    reading = [f"attention.attention.{x}.weight" for x in ("query", "key", "value")] + ["intermediate.dense.weight"]
    writing = ["attention.output.dense.weight", "output.dense.weight"]
    assert all(method.routes(vision + x) for x in reading) and not any(method.routes(vision + x) for x in writing)
    text_names = [text + x.replace("attention.attention", "attention.self") for x in reading + writing]
    assert all(method.routes(name) for name in text_names)
    assert method.routes("visual.blocks.0.attn.in_proj_weight") and method.routes("visual.blocks.0.mlp.c_fc.weight")
    assert not method.routes("visual.blocks.0.mlp.c_proj.weight") and method.routes("layers.0.down_proj.weight")
    chosen = EsmPlusPlus(routed="*.q.weight layers.1.*")
    assert [chosen.routes(n) for n in ("layers.0.q.weight", "layers.1.k.weight", "layers.0.k.weight")] == [1, 1, 0]
    assert (method.rank_of_expert(vision, (64, 48)), method.rank_of_expert(text, (64, 48))) == (32, 8)
    assert EsmPlusPlus(expert_rank=50).rank_of_expert(text, (64, 48)) == 48
    assert (method.factor_dtype(vision, "BF16"), method.factor_dtype(text, "BF16")) == ("BF16", "F16")
