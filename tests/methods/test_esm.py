from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.errors import RecipeError
from pymerge.methods.base import TensorInfo
from pymerge.methods.esm import Esm, kind_of, layer_factors
from tests.methods.esm_problems import (
    ROBERTA,
    VIT,
    Problem,
    inputs,
    of_covariance,
    of_rows,
    problem,
    reference,
    run,
)
from tests.methods.spectral import SHAPES, base_weights, off, rotations, updates

ROUTES = {"rows": of_rows, "covariance": of_covariance}
PRESETS: dict[Any, dict[str, Any]] = {"vit": VIT, "roberta": ROBERTA}
route = pytest.mark.parametrize("how", ROUTES.values(), ids=ROUTES)


@route
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tasks", [2, 3, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, int], tasks: int, preset: Any, how: Any) -> None:
    p = problem(*shape, tasks)
    merged, notes = run(p, how, preset=preset)
    assert off(merged, reference(p.deltas, p.samples, **PRESETS[preset])) <= 2e-5
    k = shape[0] // tasks
    assert notes.facts["rank"] == k and notes.facts["ranks"] == [k] * tasks
    assert notes.facts["polar_ranks"] == [k * tasks, min(k * tasks, shape[1])]
    assert "few_rows" not in notes.facts and notes.facts["layer_factor"] == 1.0


@route
@pytest.mark.parametrize(
    "settings",
    [
        {"eig_power": 0.0},
        {"eig_power": 0.3, "rank": 5},
        {"task_power": 1.0, "dim_power": 0.0, "gain": 0.5},
        {"task_norm": "truncated"},
    ],
    ids=str,
)
def test_options(settings: dict[str, Any], how: Any) -> None:
    p = problem(40, 72, 4)
    assert off(run(p, how, **settings)[0], reference(p.deltas, p.samples, **VIT | settings)) <= 2e-5


@route
def test_weights_with_a_base_and_scale(how: Any) -> None:
    p, base = problem(40, 72, 4), base_weights(40, 72)
    truth = reference(p.deltas, p.samples, **VIT)
    assert off(run(p, how, base, scale=0.7)[0], 0.7 * truth) <= 1e-4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_weights(shape: tuple[int, int]) -> None:
    base, p = base_weights(*shape, size=2.0), problem(*shape, 3)
    stored = [(base + d).bfloat16().double() - base for d in p.deltas]
    merged = run(Problem(stored, p.samples), of_covariance, base, torch.bfloat16)[0]
    assert off(merged, reference(stored, p.samples, **VIT)) <= 1e-4


@pytest.mark.parametrize("rows", [20, 30])  # k <= N < m
@route
def test_few_rows_in_the_released_norm(how: Any, rows: int) -> None:
    p = problem(40, 60, 3, rows=rows)
    for norm in ("released", "delta"):
        merged, notes = run(p, how, task_norm=norm)
        assert off(merged, reference(p.deltas, p.samples, **VIT, task_norm=norm)) <= 1e-4
        assert notes.facts["few_rows"] == [0, 1, 2] if rows < 26 else "few_rows" not in notes.facts
    assert off(run(p, how, task_norm="released")[0], run(p, how)[0]) > 1e-3


# 7.3


@route
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_invariants(shape: tuple[int, int], how: Any) -> None:
    p = problem(*shape, 4)
    merged = run(p, how)[0]
    left, _ = rotations(*shape)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(3))
    assert off(run(Problem(p.deltas[::-1], p.samples[::-1]), how)[0], merged) <= 2e-5
    assert off(run(Problem(p.deltas, [3.0 * x for x in p.samples]), how)[0], merged) <= 2e-5
    assert off(run(Problem([left @ d for d in p.deltas], p.samples), how)[0], left @ merged) <= 1e-4
    turned = Problem([d[:, order] for d in p.deltas], [x[:, order] for x in p.samples])
    assert off(run(turned, how)[0], merged[:, order]) <= 2e-5


@route
@pytest.mark.parametrize("size", [2.0**-60, 2.0**40])
def test_any_scale_of_updates_and_inputs(how: Any, size: float) -> None:
    p = problem(40, 48, 4)
    merged = run(p, how)[0]
    assert off(run(Problem([size * d for d in p.deltas], p.samples), how)[0], size * merged) <= 2e-5
    if how is of_rows or size > 1:
        assert off(run(Problem(p.deltas, [size**0.5 * x for x in p.samples]), how)[0], merged) <= 2e-5


def test_input_rotations_matter_with_dimension_scaling_only() -> None:
    p = problem(40, 40, 4)
    _, right = rotations(40, 40)
    turned = Problem([d @ right for d in p.deltas], [x @ right for x in p.samples])
    assert off(run(turned, preset="roberta")[0], run(p, preset="roberta")[0] @ right) <= 1e-4
    assert off(run(turned)[0], run(p)[0] @ right) > 0.1


@pytest.mark.parametrize("size", [300.0, 3000.0])
def test_massive_tokens(size: float) -> None:
    """From rows, and from moments that were summed in float64; float32 sums lose the other tokens."""
    p = problem(40, 60, 4)
    samples = [torch.cat([size * x[:2], x[2:]]).float().double() for x in p.samples]
    truth = reference(p.deltas, samples, **VIT)
    for how in (of_rows, partial(of_covariance, dtype=torch.float64)):
        assert off(run(Problem(p.deltas, samples), how)[0], truth) <= 2e-5


# 7.2


def frozen_rows() -> Problem:
    p = problem(48, 40, 4)
    for d in p.deltas:
        d[5:] = 0.0
    return p


HAZARDS = {
    "fewer rows than k": lambda: problem(48, 60, 4, rows=7),
    "one row": lambda: problem(48, 60, 4, rows=1),
    "rank below k": lambda: problem(48, 60, 4, rank=5),
    "rank below k, tall": lambda: problem(72, 40, 4, rank=5),
    "frozen rows": frozen_rows,
    "k above n": lambda: problem(90, 20, 2),
    "a zero update": lambda: Problem([*updates(48, 60, 3), torch.zeros(48, 60).double()], inputs(120, 60, 4)),
    "identical tasks": lambda: Problem(updates(48, 60, 1) * 4, inputs(120, 60, 1) * 4),
    "identical updates": lambda: Problem(updates(48, 60, 1) * 4, inputs(120, 60, 4)),
    "fewer rows than tasks": lambda: problem(3, 40, 5),
    "fewer columns than tasks": lambda: problem(40, 3, 5),
    "one row of weights": lambda: problem(1, 40, 3),
    "one column of weights": lambda: problem(40, 1, 3),
    "one task": lambda: problem(48, 40, 1),
    "inputs of zero": lambda: Problem(updates(48, 60, 2), [*inputs(120, 60, 1), torch.zeros(50, 60).double()]),
    "a dead input": lambda: Problem(updates(48, 60, 2), [x * (torch.arange(60) > 9) for x in inputs(120, 60, 2)]),
}


@route
@pytest.mark.parametrize("hazard", HAZARDS)
def test_hazards(hazard: str, how: Any) -> None:
    """Where the released form is rounding errors made large; section 7.2 (a), (b), (c) is the reference."""
    p = HAZARDS[hazard]()
    truth = reference(p.deltas, p.samples, **VIT)
    assert off(run(p, how)[0], truth) <= 1e-4
    base = base_weights(*p.deltas[0].shape, size=4.0)
    for d in p.deltas:
        d.copy_((base + d).float().double() - base)  # what float32 weights hold
    if hazard not in ("rank below k", "rank below k, tall", "identical updates"):
        assert off(run(p, how, base)[0], reference(p.deltas, p.samples, **VIT)) <= 1e-3


def test_nothing_to_merge() -> None:
    zeros = [torch.zeros(20, 30, dtype=torch.float64)] * 3
    merged, notes = run(Problem(zeros, inputs(60, 30, 3)))
    assert not merged.any() and notes.facts["skipped_tasks"] == [0, 1, 2] and notes.facts["ranks"] == [0, 0, 0]
    merged, notes = run(Problem(updates(20, 30, 3), [torch.zeros(60, 30).double()] * 3))
    assert not merged.any() and notes.facts["skipped_tasks"] == [0, 1, 2]
    for shape in ((0, 30), (20, 0)):
        empty = Problem([torch.zeros(shape, dtype=torch.float64)] * 2, [torch.zeros(5, shape[1]).double()] * 2)
        assert run(empty)[0].shape == shape


def test_order_of_rows_does_not_matter_with_few_of_them() -> None:
    p = problem(48, 60, 4, rows=7)
    shuffled = Problem(p.deltas, [x.flip(0) for x in p.samples])
    assert off(run(shuffled)[0], run(p)[0]) <= 1e-4


def test_lam_tol_leaves_out_the_rounding_of_bfloat16() -> None:
    p, base = problem(64, 64, 4, rank=4), base_weights(64, 64, size=20.0)
    kept = run(p, of_rows, base, torch.bfloat16, lam_tol=3e-3)[1].facts["ranks"]
    assert kept == [4] * 4 and run(p, of_rows, base, torch.bfloat16)[1].facts["ranks"] == [16] * 4


# without statistics


def svd_reference(deltas: list[Tensor], roberta: bool) -> Tensor:
    from tests.methods.spectral import isometry, leading

    m, n = deltas[0].shape
    k = max(1, min(m, n) // len(deltas))
    parts = [leading(d, k) for d in deltas]
    u, s, v = (torch.cat([p[i] for p in parts], dim=-1) for i in range(3))
    sizes = [(isometry(a) * a).sum() / min(len(a), len(deltas) * k) for a in (u, v)] if roberta else [1.0, 1.0]
    return sizes[0] * sizes[1] * isometry(u) @ torch.diag(s) @ isometry(v).mT


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 40)], ids=str)
def test_without_statistics(shape: tuple[int, int], preset: Any) -> None:
    p = problem(*shape, 3)
    merged, notes = run(p, None, base_weights(*shape), preset=preset)
    assert off(merged, svd_reference(p.deltas, preset == "roberta")) <= 1e-4
    assert notes.facts["statistics"] == "none"
    mean = sum(p.deltas, torch.zeros(shape, dtype=torch.float64)) / 3
    assert off(run(p, None, preset=preset, other_2d="mean")[0], mean) <= 1e-5


def test_scale_is_of_matrices_with_statistics_or_of_all() -> None:
    p = problem(24, 40, 3)
    for how, preset, scope, factor in (
        (of_rows, "vit", None, 0.5),
        (None, "vit", None, 1.0),
        (None, "vit", "all", 0.5),
        (None, "roberta", None, 0.5),
        (None, "roberta", "esd", 1.0),
    ):
        settings = {"preset": preset, "scale_scope": scope}
        assert off(run(p, how, scale=0.5, **settings)[0], factor * run(p, how, **settings)[0]) <= 1e-6


# presets, kinds


def test_presets_by_name() -> None:
    for name in ("visual.transformer.resblocks.0.x", "vision_model.encoder.x", "vit.encoder.x", "model.vision_tower.x"):
        assert Esm().settings(name).vision, name
    for name in ("roberta.encoder.layer.0.x", "model.layers.0.self_attn.q_proj.weight", "transformer.h.0.x"):
        assert not Esm().settings(name).vision, name
    assert (
        Esm(preset="vit").settings("roberta.x").gain == 2.0 and Esm(preset="roberta").settings("visual.x").gain == 1.0
    )


def test_what_other_tensors_get() -> None:
    text, vision = Esm(preset="roberta", scale=0.5), Esm(preset="vit", scale=0.5)
    assert text.rest_of("encoder.layer.0.output.dense.bias") == ("base", 0.5)
    assert text.rest_of("classifier.dense.weight")[0] == "base"
    assert text.rest_of("encoder.layer.0.output.LayerNorm.weight") == ("mean", 0.5)
    assert vision.rest_of("visual.ln_1.bias") == ("mean", 1.0)
    assert Esm(preset="vit", scale=0.5, scale_scope="all").rest_of("visual.ln_1.bias") == ("mean", 0.5)


def test_kinds() -> None:
    assert kind_of("encoder.layer.3.attention.output.dense.weight") == "attention.output.dense.weight"
    assert kind_of("encoder.layer.3.output.dense.weight") == "output.dense.weight"
    assert kind_of("model.layers.3.mlp.gate_up_proj.weight") == "gate_up_proj.weight"
    assert kind_of("visual.resblocks.1.attn.in_proj_weight[2]") == "attn.in_proj_weight[2]"
    assert kind_of("visual.proj") is None


def test_layer_factors() -> None:
    norms = {"0.q_proj.weight": 1.0, "1.q_proj.weight": 3.0, "0.o_proj.weight": 0.0, "1.o_proj.weight": 0.0}
    assert layer_factors(norms, 2.0) == {
        "0.q_proj.weight": 0.25,
        "1.q_proj.weight": 2.25,
        "0.o_proj.weight": 1.0,
        "1.o_proj.weight": 1.0,
    }


def test_settings_out_of_range() -> None:
    with pytest.raises(RecipeError, match="esm: rank: must be >= 1"):
        Esm(rank=0)
    with pytest.raises(RecipeError, match="esm: gain: must be > 0"):
        Esm(gain=0.0)
    with pytest.raises(RecipeError, match="esm: preset: must be one of vit, roberta"):
        Esm(preset="llama")  # type: ignore[arg-type]


def test_estimates() -> None:
    small, large = (TensorInfo(name="w", shape=(s, s), tasks=4) for s in (64, 128))
    assert math.isclose(Esm().workspace(large) / Esm().workspace(small), 4)
    assert math.isclose(Esm().work(large).flops / Esm(layer_power=0.0).work(large).flops, 2)
