from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.methods import _svc_directions as directions
from pymerge.methods.svc import SVC
from tests.methods.svc_reference import SHAPES, calibrated, distance, every_shape, group_of, tasks_of, truth


def low_rank(m: int, n: int, rows: range, columns: range, seed: int = 0) -> Tensor:
    """A matrix of rank 3 whose entries lie in the given rows and columns."""
    g = torch.Generator().manual_seed(seed)
    d = torch.zeros(m, n)
    d[rows.start : rows.stop, columns.start : columns.stop] = torch.randn(len(rows), 3, generator=g) @ torch.randn(
        3, len(columns), generator=g
    )
    return d


@every_shape
@pytest.mark.parametrize("alpha", [None, 1.0, 0.05])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("coefficient", [0.3, 1.0])
def test_matches_the_formula(shape: Any, alpha: float | None, side: str, coefficient: float) -> None:
    tasks = tasks_of(shape)
    update = coefficient * sum(tasks)
    expected, _ = truth(update, tasks, alpha or 1 / 3, right=side == "right")
    assert distance(calibrated(update, tasks, alpha=alpha, side=side), expected) < 3e-6


@every_shape
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("given", [{"rule": "mean_then_clip"}, {"target": 0}], ids=str)
def test_other_rules_match_the_formula(shape: Any, side: str, given: dict[str, Any]) -> None:
    tasks = tasks_of(shape)
    tasks[2] = tasks[2] - tasks[0]  # in conflict with the others: some coefficients are negative
    update = 0.5 * sum(tasks)
    expected, eta = truth(update, tasks, 0.2, right=side == "right", **given)
    assert 0.1 < float((eta == 1).double().mean()) < 1
    assert distance(calibrated(update, tasks, alpha=0.2, side=side, **given), expected) < 3e-6


@every_shape
def test_only_the_target_is_read(shape: Any) -> None:
    tasks = tasks_of(shape)
    others = [torch.full_like(tasks[0], torch.nan), tasks[1], torch.full_like(tasks[0], torch.nan)]
    update = sum(tasks)
    assert torch.equal(calibrated(update, others, target=1), calibrated(update, tasks, target=1))


@every_shape
def test_stored_weights_in_bfloat16(shape: Any) -> None:
    g = torch.Generator().manual_seed(1)
    base = torch.randn(shape, generator=g).bfloat16()
    tuned = [(base + 0.1 * d).bfloat16() for d in tasks_of(shape)]
    deltas = [t.float() - base.float() for t in tuned]
    update = 0.3 * sum(deltas)
    for side in ("left", "right"):
        expected, _ = truth(update, deltas, 1 / 3, right=side == "right")
        assert distance(calibrated(update, tuned, base, side=side), expected) < 3e-6
    mixed = [tuned[0].float(), tuned[1], tuned[2].double()]
    assert torch.equal(calibrated(update, mixed, base.half().bfloat16()), calibrated(update, tuned, base))


@every_shape
def test_right_is_left_of_the_transposes(shape: Any) -> None:
    tasks = tasks_of(shape)
    turned = [t.mT.contiguous() for t in tasks]
    right = calibrated(sum(tasks), tasks, side="right")
    assert right.shape == shape and right.is_contiguous()
    assert distance(right, calibrated(sum(turned), turned).mT) < 1e-6


@every_shape
def test_order_of_tasks_does_not_matter(shape: Any) -> None:
    tasks = tasks_of(shape)
    assert distance(calibrated(sum(tasks), tasks[::-1]), calibrated(sum(tasks), tasks)) < 1e-6


@every_shape
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_scales_with_the_tasks(shape: Any, scale: float) -> None:
    tasks = tasks_of(shape)
    scaled = calibrated(sum(tasks) * scale, [t * scale for t in tasks])
    assert distance(scaled.double() / scale, calibrated(sum(tasks), tasks)) < 2e-6


@every_shape
def test_turns_with_the_tasks(shape: Any) -> None:
    g = torch.Generator().manual_seed(2)
    p, q = (torch.linalg.qr(torch.randn(k, k, generator=g, dtype=torch.float64)).Q for k in shape)
    tasks = tasks_of(shape)
    turned = [(p @ t.double() @ q).float() for t in tasks]
    assert distance(calibrated(sum(turned), turned), p @ calibrated(sum(tasks), tasks).double() @ q) < 3e-6


@pytest.mark.parametrize("coefficient", [0.05, 0.3, 1.0, 2.0])
def test_identical_tasks_give_the_task(coefficient: float) -> None:
    task = tasks_of((20, 33), 1)[0]
    alpha, c = 0.2, 4 * coefficient
    expected = task * min(1.0, c / alpha)
    assert distance(calibrated(c * task, [task] * 4, alpha=alpha), expected) < 2e-6


def test_large_coefficients_keep_their_accuracy() -> None:
    task = tasks_of((20, 33), 1)[0]
    assert distance(calibrated(1e6 * task, [task] * 2), task) < 2e-6


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (60, 60)], ids=str)
@pytest.mark.parametrize("alpha", [1 / 3, 1.0])
def test_disjoint_tasks_are_amplified_alike(shape: Any, alpha: float) -> None:
    """No task responds to another's directions: these responses are rounding noise that must not count."""
    m, n = shape
    g = torch.Generator().manual_seed(3)
    p, q = (torch.linalg.qr(torch.randn(k, k, generator=g, dtype=torch.float64)).Q for k in shape)
    blocks = [low_rank(m, n, range(16 * t, 16 * t + 16), range(16 * t, 16 * t + 16), t) for t in range(3)]
    tasks = [(p @ b.double() @ q).float() for b in blocks]
    update = sum(tasks)
    group = group_of(tasks)
    result = SVC(alpha=alpha).calibrate(update.clone(), group)
    assert distance(result, update * 3 / (1 + 2 * alpha)) < 3e-6
    assert group.notes.facts["svc_silent"] > 0.6


def test_base_coefficient_cancels_where_no_coefficient_is_clipped() -> None:
    tasks = [t + tasks_of((24, 40), 1, seed=9, shared=0)[0] * 3 for t in tasks_of((24, 40), shared=0)]
    results = [calibrated(c * sum(tasks), tasks, alpha=1e-6) for c in (1 / 3, 0.3, 1.0, 100.0)]
    for other in results[1:]:
        assert distance(other, results[0]) < 2e-6


def test_alpha_one_leaves_what_is_not_counted_twice() -> None:
    tasks = tasks_of((24, 40), shared=0)
    update = 0.1 * sum(tasks)
    group = group_of(tasks)
    assert torch.equal(SVC(alpha=1).calibrate(update.clone(), group), update)
    assert group.notes.facts["svc_eta_mean"] == 1 and group.notes.facts["svc_at_alpha"] == 1


def test_alpha_is_one_after_tsv_m() -> None:
    tasks = tasks_of((24, 40))
    for combine, alpha in (("tsv_m", 1.0), ("ties", 1 / 3)):
        group = group_of(tasks, combine=combine)
        result = SVC().calibrate(sum(tasks), group)
        assert group.notes.facts["svc_alpha"] == alpha
        assert distance(result, truth(sum(tasks), tasks, alpha)[0]) < 3e-6


def test_facts() -> None:
    tasks = tasks_of((20, 56), shared=3)
    group = group_of(tasks)
    result = SVC().calibrate(0.6 * sum(tasks), group)
    _, eta = truth(0.6 * sum(tasks), tasks, 1 / 3)
    facts = group.notes.facts
    assert facts["svc_eta_leading"] == pytest.approx(eta[:8].tolist(), rel=1e-4)
    assert facts["svc_eta_mean"] == pytest.approx(float(eta.mean()), rel=1e-4)
    assert facts["svc_eta_least"] == pytest.approx(float(eta.min()), rel=1e-4)
    assert facts["svc_eta_most"] == pytest.approx(float(eta.max()), rel=1e-4)
    assert facts["svc_suppressed"] == float((eta > 1).double().mean()) > 0
    assert facts["svc_amplified"] == float((eta < 1).double().mean()) > 0
    assert (facts["svc_route"], facts["svc_rank"], facts["svc_silent"]) == ("gram", 20, 0.0)
    assert all(isinstance(x, float | int | str | list) for x in facts.values())
    u, s, _ = torch.linalg.svd(0.6 * sum(tasks).double(), full_matrices=False)
    at = [0, 1, 3, 7, 15]  # directions 1, 2, 4, 8, 16 of 20
    assert facts["svc_before"] == pytest.approx(s[at].tolist(), rel=1e-4)
    assert facts["svc_after"] == pytest.approx((u.mT @ result.double()).norm(dim=1)[at].tolist(), rel=1e-4)


@every_shape
@pytest.mark.parametrize("side", ["left", "right"])
def test_inputs_other_than_the_update_are_left_alone(shape: Any, side: str) -> None:
    tasks = tasks_of(shape)
    u, _, vh = torch.linalg.svd(sum(tasks), full_matrices=False)
    inputs = [torch.ones(shape), *tasks, u, vh]
    copies = [x.clone() for x in inputs]
    group = group_of(tasks, inputs[0])
    SVC(side=side).calibrate(sum(tasks), group)
    group.notes.basis = lambda: (u, vh.mT)
    SVC(side=side).calibrate(u @ vh, group)
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))


# An update whose singular values are equal


@every_shape
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("columns", [20, 7])
def test_directions_of_the_combine_step(shape: Any, side: str, columns: int) -> None:
    tasks = tasks_of(shape)
    u, s, vh = torch.linalg.svd(sum(tasks), full_matrices=False)
    u, v = u[:, :columns], vh[:columns].mT
    update = s.mean() * u @ v.mT
    group = group_of(tasks)
    group.notes.basis = lambda: (u, v)
    result = SVC(side=side).calibrate(update.clone(), group)
    expected, _ = truth(update, tasks, 1 / 3, right=side == "right", given=(u, v))
    assert distance(result, expected) < 3e-6
    assert (group.notes.facts["svc_route"], group.notes.facts["svc_rank"]) == ("base", columns)


@pytest.mark.parametrize("given", [{"basis": "recompute"}, {"preset": "released"}], ids=str)
def test_own_directions_are_an_option(given: dict[str, Any]) -> None:
    tasks = tasks_of((20, 56))
    group = group_of(tasks)
    group.notes.basis = lambda: pytest.fail("not wanted")
    result = SVC(**given).calibrate(sum(tasks), group)
    assert distance(result, truth(sum(tasks), tasks, 1 / 3)[0]) < 3e-6
    assert group.notes.facts["svc_route"] == "gram"


# Leading directions only


def spiked(shape: tuple[int, int], tasks: int = 3) -> list[Tensor]:
    """Task vectors with 6 strong shared directions over unrelated noise."""
    g = torch.Generator().manual_seed(4)
    m, n = shape
    common = torch.randn(m, 6, generator=g) @ torch.randn(6, n, generator=g)
    return [common + torch.randn(m, n, generator=g) for _ in range(tasks)]


@pytest.mark.parametrize("shape", [(80, 80), (64, 150), (150, 64)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_leading_directions_are_enough_where_the_rest_would_stay(shape: Any, side: str) -> None:
    tasks = spiked(shape)
    update = 0.4 * sum(tasks)
    group = group_of(tasks)
    result = SVC(alpha=1, rank=8, side=side).calibrate(update.clone(), group)
    assert (group.notes.facts["svc_route"], group.notes.facts["svc_rank"]) == ("truncated", 8)
    assert distance(result, calibrated(update, tasks, alpha=1, side=side)) < 1e-6
    assert distance(result, update) > 0.05


@pytest.mark.parametrize("rank", [2, 60])
def test_a_rank_that_is_not_enough_is_not_used(rank: int) -> None:
    tasks = spiked((64, 150))
    update = 0.4 * sum(tasks)
    group = group_of(tasks)
    result = SVC(alpha=1, rank=rank).calibrate(update.clone(), group)
    assert (group.notes.facts["svc_route"], group.notes.facts["svc_rank"]) == ("gram", 64)
    assert torch.equal(result, calibrated(update, tasks, alpha=1))


def test_directions_reproduce_the_update() -> None:
    for shape in SHAPES:
        update = sum(tasks_of(shape))
        d = directions.all_directions(update)
        assert distance(d.q @ d.p, update) < 1e-6
        assert distance(d.q.mT @ d.q, torch.eye(min(shape))) < 1e-6
        s = torch.linalg.svdvals(update)
        torch.testing.assert_close(d.p.norm(dim=1), s, rtol=0, atol=1e-6 * float(s[0]))
