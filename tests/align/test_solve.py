"""The search: the released schedule, what its result must not depend on, what it reports."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pymerge
from pymerge.align import Entry, Spec, Units
from pymerge.align.api import permuted
from pymerge.align.solve import Solver
from pymerge.align.sweeps import Options
from pymerge.align.weights import WeightSimilarity
from pymerge.checkpoint import open_checkpoint
from pymerge.errors import InputError, NonFinite, ShapeMismatch
from tests.align.nets import Mlp, merged, mlp_spec, scrambled

ROOT = Path(__file__).parents[2]


def dense_solver():
    path = ROOT / "benchmarks" / "dense_alignment.py"
    found = importlib.util.spec_from_file_location("dense_alignment", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module.DenseSolver


def chain(count: int, size: int, blocks: int) -> tuple[Spec, list[tuple[str, tuple[int, ...]]]]:
    """Groups in a ring: every one shares a parameter with its neighbours, and one has a parameter on both its axes."""
    groups, shapes = [], []
    for at in range(count):
        shapes += [(f"w{at}", (size, size)), (f"conv{at}", (size, size, 3)), (f"b{at}", (size,))]
        entries = [
            Entry(parameter=f"w{at}", axis=0, role="out"),
            Entry(parameter=f"b{at}", axis=0, role="out"),
            Entry(parameter=f"conv{at}", axis=1, role="in"),
            Entry(parameter=f"w{(at - 1) % count}", axis=1, role="in"),
            Entry(parameter=f"conv{(at - 1) % count}", axis=0, role="out"),
        ]
        if at == 0:
            shapes.append(("square", (size, size)))
            entries += [Entry(parameter="square", axis=axis, role=role) for axis, role in enumerate(("out", "in"))]
        groups.append(Units(name=f"g{at}", size=size, entries=tuple(entries), blocks=blocks))
    return Spec(groups=tuple(groups)), shapes


def drawn(shapes: list[tuple[str, tuple[int, ...]]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("alpha", "models", "blocks"), [(0.5, 2, 1), (1.0, 2, 4), (0.3, 3, 1), (1.0, 3, 1)])
def test_the_released_schedule_with_nothing_remembered_finds_the_same(seed, alpha, models, blocks):
    spec, shapes = chain(4, 16, blocks)
    spec.check(dict(shapes))
    states = [drawn(shapes, 100 * seed + t) for t in range(models)]
    seen: dict[str, Tensor] = {}
    for at, group in enumerate(spec.groups):
        samples = torch.randn(16 * models, 60, generator=torch.Generator().manual_seed(seed * 10 + at))
        seen[group.name] = torch.corrcoef(samples)
    activations = [
        {name: {"units": full[:16, 16 * t : 16 * (t + 1)]} for name, full in seen.items()} for t in range(1, models)
    ]
    dense = dense_solver()(spec, states, seen, alpha, seed)
    expected = dense.run(dense.from_activations())
    weights = WeightSimilarity(spec, [open_checkpoint(state) for state in states], cosine=False, memory=1 << 20)
    solver = Solver(spec, weights, activations, Options(alpha=alpha, seed=seed))
    solution = solver.run(from_activations=True)
    for t, placed in enumerate(solution.state, 1):
        for name, found in placed.items():
            assert torch.equal(found.index["units"], expected[name][t].argmax(1)), (name, t)
    ours = solution.objectives
    assert ours == pytest.approx(dense.objectives[: len(ours)], abs=1e-5)
    assert max(ours) == pytest.approx(max(dense.objectives), abs=1e-5)
    assert solution.solved < len(dense.objectives) * len(spec.groups) * (models - 1)


def test_what_is_kept_between_sweeps_changes_nothing():
    spec, shapes = chain(4, 16, 1)
    states = [open_checkpoint(drawn(shapes, t)) for t in range(2)]
    found = []
    for memory in (0, 4 * 16 * 16 * 3, 1 << 20):
        solver = Solver(spec, WeightSimilarity(spec, states, cosine=False, memory=memory), [{}], Options(alpha=1.0))
        found.append(permuted(solver, solver.run(False), {"spec": spec, "models": ("a", "b")}))
    for other in found[1:]:
        assert other.report["sweeps"] == found[0].report["sweeps"]
        for group in spec.groups:
            assert torch.equal(other.index[group.name]["units"], found[0].index[group.name]["units"])


def batches(count: int = 3, rows: int = 40) -> list[Tensor]:
    return list(torch.randn(count, rows, 10, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("blocks", [1, 4])
def test_order_of_a_models_units_does_not_change_the_merge(alpha, blocks):
    spec = mlp_spec(blocks=blocks)
    one, other, again = Mlp(0), Mlp(1), Mlp(1)
    state, _ = scrambled(other, spec, seed=3)
    again.load_state_dict(state)
    plain = pymerge.find_permutations([one, other], batches(), spec=spec, alpha=alpha)
    found = pymerge.find_permutations([one, again], batches(), spec=spec, alpha=alpha)
    first = merged(plain, [dict(one.state_dict()), dict(other.state_dict())])
    second = merged(found, [dict(one.state_dict()), dict(again.state_dict())])
    for name, value in first.items():
        assert (second[name] - value).norm() <= 1e-6 * value.norm(), name


@pytest.mark.parametrize("mode", ["activations", "weights", "both", "cosine"])
def test_a_scrambled_model_is_put_back(mode):
    spec, model, other = mlp_spec(), Mlp(0), Mlp(0)
    state, order = scrambled(model, spec, seed=1)
    other.load_state_dict(state)
    data = None if mode in ("weights", "cosine") else batches()
    found = pymerge.find_permutations(
        [model, other],
        data,
        spec=spec,
        alpha={"activations": 0.0, "both": 0.5}.get(mode),
        similarity="cosine" if mode == "cosine" else "correlation",
    )
    found.check()
    for name, p in model.state_dict().items():
        assert torch.equal(found.aligned(name, state[name], 1), p), name
    assert found.report["after"] == pytest.approx(1, abs=1e-5)
    assert found.report["before"] < 0.5
    for group in spec.groups:
        row = found.report["groups"][group.name]
        identity = torch.arange(group.size)
        assert row["units"] == group.size
        assert row["moved"] == [int((order.index[group.name]["units"][1] != identity).sum())]
        assert row["gap"][0] <= 1e-6


@pytest.mark.parametrize("data", [True, False])
def test_identical_models_stay_as_they_are(data):
    found = pymerge.find_permutations([Mlp(0)] * 3, batches() if data else None, spec=mlp_spec())
    for views in found.index.values():
        assert torch.equal(views["units"], torch.arange(views["units"].shape[1]).repeat(3, 1))
    assert all(row["moved"] == [0, 0] for row in found.report["groups"].values())


def test_every_model_is_matched_to_the_first_by_itself():
    spec = mlp_spec()
    three = pymerge.find_permutations([Mlp(0), Mlp(1), Mlp(2)], batches(), spec=spec, alpha=0.0)
    for t in (1, 2):
        pair = pymerge.find_permutations([Mlp(0), Mlp(t)], batches(), spec=spec, alpha=0.0)
        for name, views in pair.index.items():
            assert torch.equal(views["units"][1], three.index[name]["units"][t])


def test_activations_alone_need_no_sweep_and_no_weights(monkeypatch):
    monkeypatch.setattr(WeightSimilarity, "scores", None)
    found = pymerge.find_permutations([Mlp(0), Mlp(1)], batches(), spec=mlp_spec(), alpha=0.0)
    assert found.report["sweeps"] == found.report["assignments"] == 0
    assert found.report["after"] > found.report["before"] + 0.1


def test_units_that_nothing_is_seen_of_go_by_their_weights():
    spec = mlp_spec()
    blind = Spec(groups=(spec.groups[0], Units(name="h1", size=20, entries=spec.groups[1].entries)), fixed=spec.fixed)
    model, other = Mlp(0), Mlp(0)
    state, _ = scrambled(model, spec, seed=1)
    other.load_state_dict(state)
    for alpha in (0.0, 0.5):
        found = pymerge.find_permutations([model, other], batches(), spec=blind, alpha=alpha)
        for name, p in model.state_dict().items():
            assert torch.equal(found.aligned(name, state[name], 1), p), name


def test_a_gain_below_the_threshold_moves_nothing():
    models = [Mlp(0), Mlp(1)]
    gains = pymerge.find_permutations(models, batches(), spec=mlp_spec(), alpha=0.0).report["groups"]
    gain = {name: row["after"][0] - row["before"][0] for name, row in gains.items()}
    small, large = sorted(gain, key=gain.__getitem__)
    between = (gain[small] + gain[large]) / 2
    found = pymerge.find_permutations(models, batches(), spec=mlp_spec(), alpha=0.0, threshold=between).report["groups"]
    assert found[small]["moved"] == [0] and found[small]["after"] == found[small]["before"]
    assert found[large]["moved"] == gains[large]["moved"]
    assert found[small]["gap"][0] == pytest.approx(gain[small], abs=1e-6)


def test_dead_units_and_ties_are_valid_and_cost_nothing():
    """Units that never fire have similarity 0 to all: any place for them is as good."""
    one, other = Mlp(0), Mlp(1)
    with torch.no_grad():
        for model, dead in ((one, slice(0, 5)), (other, slice(3, 11))):
            model.fc0.weight[dead] = 0
            model.fc0.bias[dead] = -1
    found = pymerge.find_permutations([one, other], batches(), spec=mlp_spec(), alpha=0.0)
    found.check()
    fewest = min(24 - 5, 24 - 8)  # of the pairs, those without a dead unit, at most 1 each
    assert 24 * found.report["groups"]["h0"]["after"][0] <= fewest
    alive = pymerge.find_permutations([one, other], batches(), spec=mlp_spec(), alpha=0.5)
    alive.check()
    assert alive.report["after"] > alive.report["before"]


def test_sweeps_are_reported_as_they_end():
    seen: list[tuple[int, float]] = []
    found = pymerge.find_permutations(
        [Mlp(0), Mlp(1)], batches(), spec=mlp_spec(), progress=lambda sweep, value: seen.append((sweep, value))
    )
    assert [number for number, _ in seen] == list(range(1, found.report["sweeps"] + 1))
    assert [value for _, value in seen] == sorted(value for _, value in seen)


def test_wrong_calls_say_what_is_wrong():
    one, other = Mlp(0), Mlp(1)
    with pytest.raises(InputError, match="at least two"):
        pymerge.find_permutations([one], spec=mlp_spec())
    with pytest.raises(InputError, match="alpha = 0.5 needs activations"):
        pymerge.find_permutations([one, other], spec=mlp_spec(), alpha=0.5)
    with pytest.raises(InputError, match="there was no batch"):
        pymerge.find_permutations([one, other], [], spec=mlp_spec())
    with pytest.raises(InputError, match="alpha must be from 0.0 to 1.0, got 2.*start = 'activations' needs"):
        pymerge.find_permutations([one, other], spec=mlp_spec(), alpha=2, start="activations")
    with pytest.raises(InputError, match="mode must be permute or zip, got 'unzip'; patience must be from 1 to"):
        pymerge.find_permutations([one, other], spec=mlp_spec(), mode="unzip", patience=0)
    with pytest.raises(ShapeMismatch, match=r"fc0.weight: \[24, 10\] in model 0, \[12, 10\] in model 1"):
        pymerge.find_permutations([one, Mlp(0, (10, 12, 20, 6))], spec=mlp_spec())
    with pytest.raises(InputError, match="state dict: batches need models that run"):
        pymerge.find_permutations([dict(one.state_dict()), other], batches(), spec=mlp_spec())
    with torch.no_grad():
        other.fc1.weight[3, 4] = float("nan")
    with pytest.raises(NonFinite, match=r"fc1.weight: has NaN or infinite entries in model 1"):
        pymerge.find_permutations([one, other], spec=mlp_spec())
    with pytest.raises(NonFinite, match=r"fc2: its input has NaN or infinite entries in the samples, in model 1"):
        pymerge.find_permutations([one, other], batches(), spec=mlp_spec())
