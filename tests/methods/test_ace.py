"""ACE against a plain float64 reading of the released algorithm, its invariants, and what it makes of hard inputs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pymerge.errors import NonFinite, RecipeError
from pymerge.methods.ace import Ace
from pymerge.methods.base import TaskGroup, TensorInfo
from tests.golden.cases import FOLDER

SHAPES = [(40, 40), (72, 24), (24, 72), (20, 90), (24, 100), (3, 50), (50, 3), (2, 2)]
Made = tuple[Tensor, dict[str, Any]]


def ace(tuned: list[Tensor], base: Tensor | None = None, **options: Any) -> Made:
    """The update, float64, and the facts."""
    info = TensorInfo(name="w", shape=tuple(tuned[0].shape), tasks=len(tuned))
    group = TaskGroup(info=info, base=base, tuned=tuple(tuned))
    update = Ace(**options).combine(group)
    assert update.dtype == torch.float32 and bool(torch.isfinite(update).all())
    json.dumps(group.notes.facts, allow_nan=False)
    return update.double(), group.notes.facts


def reference(
    deltas: list[Tensor],
    eps: float = 1e-5,
    tau: float = 0.3,
    k_frac: float = 0.3,
    prior: bool = True,
    center: bool = True,
    unequal: bool | None = None,
    refined: bool = True,
) -> Tensor:
    """Section 3 of the specification step by step, in float64: explicit Grams, inverse and SVD."""
    d = torch.stack(deltas).double()  # [T, m, n]
    tasks, m, n = d.shape
    energy = d.square().sum((1, 2))
    logs = (energy + 1e-12).log()
    gamma = logs.var() / (logs.mean() ** 2 + 1e-12) if tasks > 1 else torch.tensor(0.0)
    unequal = bool(gamma > tau) if unequal is None else unequal
    c = d - d.mean(1, keepdim=True)
    gram = c.mT @ c
    trace = gram.diagonal(dim1=1, dim2=2).sum(1) + 1e-12
    divisor = trace if unequal else torch.ones_like(trace)
    s, ridge = gram / divisor[:, None, None], eps / divisor
    eye = torch.eye(n, dtype=torch.float64)
    total = s.sum(0) + ridge.sum() * eye
    averaged = c if center else d
    b = (averaged @ s).sum(0) + (averaged * ridge[:, None, None]).sum(0)
    row = s.sum(0).mean(0) / (energy.mean() + 1e-12 if unequal else 1.0)
    x = b @ torch.linalg.inv(total + row if prior else total)
    if not unequal or not refined:
        return x
    f = (d @ (s - total / tasks)).sum(0) + x
    u, values, vh = torch.linalg.svd(f, full_matrices=False)
    k = max(1, int(k_frac * min(m, n)))
    return x + values[:k].mean() * u[:, :k] @ vh[:k]


def error(mine: Tensor, expected: Tensor) -> float:
    return float((mine - expected).norm() / expected.norm())


def updates(m: int, n: int, sizes: tuple[float, ...], noise: float = 0.3, seed: int = 0) -> list[Tensor]:
    """Power-law spectra, a direction that the tasks share, dense noise; float32 of Frobenius norms `sizes`."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    r, shared = min(m, n), randn(m, 1) @ randn(1, n)
    found = []
    for size in sizes:
        u, v = torch.linalg.qr(randn(m, r)).Q, torch.linalg.qr(randn(n, r)).Q
        d = (u / (1 + torch.arange(r).double())) @ v.mT
        parts = (d, 0.3 * shared, noise * randn(m, n))
        d = parts[0] / parts[0].norm() + 0.3 * parts[1] / parts[1].norm() + noise * parts[2] / parts[2].norm()
        found.append((size * d / d.norm()).float())
    return found


EQUAL, UNEQUAL = (0.5, 0.6, 0.45, 0.55), (0.2, 1.3, 0.5, 0.9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("eps", [1e-2, 1e-5])
def test_equal_energies_against_the_reference(shape: tuple[int, int], eps: float) -> None:
    deltas = updates(*shape, EQUAL)
    mine, facts = ace(deltas, eps=eps)
    assert facts["branch"] == "homogeneous" and "sigma" not in facts
    assert facts["route"] == ("push_through" if 4 * shape[0] <= shape[1] else "dense")
    assert error(mine, reference(deltas, eps)) <= 5e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("eps", [1e-3, 1e-5])
def test_unequal_energies_against_the_reference(shape: tuple[int, int], eps: float) -> None:
    deltas = updates(*shape, UNEQUAL)
    mine, facts = ace(deltas, eps=eps, gate="heterogeneous")
    assert facts["refinement"] == "added" and facts["k"] == max(1, int(0.3 * min(shape)))
    assert error(mine, reference(deltas, eps, unequal=True)) <= 1e-4


@pytest.mark.parametrize("shape", [(40, 40), (72, 24), (24, 72), (20, 90)], ids=str)
@pytest.mark.parametrize("unequal", [False, True], ids=["equal", "unequal"])
@pytest.mark.parametrize("options", [{"prior": "none"}, {"center": False}, {"center": False, "prior": "none"}], ids=str)
def test_options_against_the_reference(shape: tuple[int, int], unequal: bool, options: dict[str, Any]) -> None:
    deltas = updates(*shape, UNEQUAL if unequal else EQUAL)
    mine, _ = ace(deltas, gate="heterogeneous" if unequal else "homogeneous", **options)
    expected = reference(deltas, unequal=unequal, prior="prior" not in options, center=options.get("center", True))
    assert error(mine, expected) <= 1e-4


def test_options_that_only_add_or_multiply() -> None:
    deltas = updates(40, 24, UNEQUAL)
    plain, _ = ace(deltas)
    mean = torch.stack(deltas).double().mean(0).mean(0)
    assert error(ace(deltas, keep_mean="average")[0], plain + mean) <= 1e-6
    assert error(ace(deltas, scale=-0.5)[0], -0.5 * plain) <= 1e-6
    share = {"gate": "heterogeneous", "k_frac": 0.6}
    assert error(ace(deltas, **share)[0], reference(deltas, unequal=True, k_frac=0.6)) <= 1e-4
    never, facts = ace(deltas, gate="heterogeneous", refine="never")
    assert facts["refinement"] == "off"
    assert error(never, reference(deltas, unequal=True, refined=False)) <= 1e-5


@pytest.mark.parametrize("shape", [(40, 40), (72, 24), (24, 72), (20, 90)], ids=str)
def test_both_routes_agree(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from pymerge.methods import _ace_solve

    deltas = updates(*shape, UNEQUAL)
    for options in ({"eps": 1e-5}, {"eps": 1e-2, "center": False}, {"eps": 1e-7, "refine": "never"}):
        made = []
        for low in (True, False):
            monkeypatch.setattr(_ace_solve.System, "is_low", property(lambda _, low=low: low))
            made.append(ace(deltas, gate="heterogeneous", refine=options.get("refine", "always"), eps=options["eps"]))
        assert [facts["route"] for _, facts in made] == ["push_through", "dense"]
        assert error(made[0][0], made[1][0]) <= 1e-4


def test_ill_conditioned_sums_are_taken_in_float64() -> None:
    deltas = updates(64, 48, EQUAL, noise=1e-4)
    decaying = [d @ torch.diag(10 ** (-3 * torch.arange(48) / 48)) for d in deltas]
    mine, facts = ace(decaying, eps=1e-9)
    assert facts["precision"] == "float64" and facts["condition"] > 1e5
    assert error(mine, reference(decaying, 1e-9)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_half_precision_inputs_are_widened_exactly(dtype: torch.dtype, sizes: tuple[float, ...]) -> None:
    base = 0.05 * torch.randn(48, 40, generator=torch.Generator().manual_seed(9))
    stored = [(base + d).to(dtype) for d in updates(48, 40, sizes)]
    base = base.to(dtype)
    gate = "homogeneous" if sizes == EQUAL else "heterogeneous"
    mine, _ = ace(stored, base, gate=gate)
    rounded = [x.float() - base.float() for x in stored]
    assert error(mine, reference(rounded, unequal=sizes == UNEQUAL)) <= 5e-5


# Invariants (section 7.4), to rounding: sums over tasks, rows and columns change their order.


@pytest.mark.parametrize("shape", [(48, 40), (24, 72), (16, 90)], ids=str)
@pytest.mark.parametrize("gate", ["homogeneous", "heterogeneous"])
def test_permutations_of_tasks_rows_and_columns(shape: tuple[int, int], gate: Any) -> None:
    deltas = updates(*shape, UNEQUAL)
    plain, _ = ace(deltas, gate=gate, eps=1e-3)
    g = torch.Generator().manual_seed(3)
    rows, columns = torch.randperm(shape[0], generator=g), torch.randperm(shape[1], generator=g)
    assert error(ace(deltas[::-1], gate=gate, eps=1e-3)[0], plain) <= 2e-5
    assert error(ace([d[rows] for d in deltas], gate=gate, eps=1e-3)[0], plain[rows]) <= 2e-5
    assert error(ace([d[:, columns] for d in deltas], gate=gate, eps=1e-3)[0], plain[:, columns]) <= 2e-5


@pytest.mark.parametrize("shape", [(48, 40), (24, 72), (16, 90)], ids=str)
def test_columns_of_the_closed_form_sum_to_zero(shape: tuple[int, int]) -> None:
    mine, _ = ace(updates(*shape, EQUAL))
    assert float(mine.sum(0).abs().max()) <= 1e-5 * float(mine.norm())


@pytest.mark.parametrize("factor", [2.0**-9, 2.0**12])
def test_equal_energies_scale_with_the_square_root_of_eps(factor: float) -> None:
    deltas = updates(40, 48, EQUAL)
    scaled, _ = ace([factor * d for d in deltas], eps=1e-3 * factor**2, gate="homogeneous")
    assert error(scaled, factor * ace(deltas, eps=1e-3, gate="homogeneous")[0]) <= 2e-5


def test_a_large_eps_gives_the_centred_average() -> None:
    deltas = updates(40, 48, EQUAL)
    mean = torch.stack(deltas).double().mean(0)
    assert error(ace(deltas, eps=1e4, prior="none")[0], mean - mean.mean(0)) <= 1e-3
    assert error(ace(deltas, eps=1e4, prior="none", keep_mean="average")[0], mean) <= 1e-3


@pytest.mark.parametrize("shape", [(40, 24), (12, 90)], ids=str)
def test_without_prior_and_centring_identical_tasks_return_themselves(shape: tuple[int, int]) -> None:
    one = updates(*shape, (0.7,))[0]
    for count in (1, 3):
        mine, facts = ace([one] * count, prior="none", center=False, eps=1e-3)
        assert facts["branch"] == "homogeneous" and error(mine, one.double()) <= 1e-5
        assert facts["cosine"] == pytest.approx(1.0, abs=1e-6)


# Hazards (section 7.3): finite, documented, with a word in the facts.


@pytest.mark.parametrize("shape", [(40, 24), (12, 90)], ids=str)
def test_a_task_without_update_is_left_out(shape: tuple[int, int]) -> None:
    deltas = updates(*shape, (0.2, 1.3, 0.5))
    plain, facts = ace(deltas, gate="heterogeneous", prior="none")
    mine, with_zero = ace([*deltas[:1], torch.zeros(shape), *deltas[1:]], gate="heterogeneous", prior="none")
    assert error(mine, plain) <= 1e-6
    assert with_zero["skipped"] == [1] and facts["skipped"] == [] and with_zero["gamma"] == facts["gamma"]


def test_a_left_out_task_counts_in_the_averages() -> None:
    deltas = updates(40, 24, (0.5, 0.6, 0.55))
    zero = torch.zeros_like(deltas[0])
    mine, _ = ace([*deltas, zero], keep_mean="average")
    mean = torch.stack([*deltas, zero]).double().mean((0, 1))
    assert error(mine, ace(deltas)[0] + mean) <= 1e-6


def test_an_update_equal_in_all_rows_has_nothing_to_weigh() -> None:
    deltas = updates(40, 24, (0.5, 0.6, 0.55))
    same = torch.randn(1, 24, generator=torch.Generator().manual_seed(1)).expand(40, 24).contiguous()
    mine, facts = ace([same, *deltas], gate="heterogeneous", prior="none")
    assert facts["skipped"] == [0]
    assert error(mine, ace(deltas, gate="heterogeneous", prior="none")[0]) <= 1e-5


def test_a_large_relative_ridge_switches_the_refinement_off() -> None:
    deltas = updates(40, 40, (0.02, 0.9, 0.3, 0.5))
    guarded, facts = ace(deltas, eps=1e-2, gate="heterogeneous")
    assert facts["refinement"] == "skipped: ebar" and facts["ebar"] > 0.1 and facts["cosine"] > 0.3
    assert error(guarded, reference(deltas, 1e-2, unequal=True, refined=False)) <= 1e-5
    for options in ({"refine": "always", "eps": 1e-2}, {"preset": "released"}):
        released, facts = ace(deltas, gate="heterogeneous", **options)
        assert facts["refinement"] == "added" and facts["cosine"] < -0.3
        assert error(released, reference(deltas, 1e-2, unequal=True)) <= 1e-4


def test_the_released_preset_keeps_a_task_without_update_and_stays_finite() -> None:
    deltas = [*updates(40, 24, (0.2, 1.3, 0.5)), torch.zeros(40, 24)]
    mine, facts = ace(deltas, preset="released")
    assert facts["skipped"] == [] and facts["branch"] == "heterogeneous" and facts["cosine"] < 0
    assert error(mine, reference(deltas, 1e-2)) <= 1e-4 and float(mine.norm()) > 1e6


@pytest.mark.parametrize("preset", ["default", "released"])
@pytest.mark.parametrize("gate", ["released", "homogeneous", "heterogeneous"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 90), (1, 5), (5, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("tasks", [1, 3])
def test_zero_updates_give_zero(preset: Any, gate: Any, shape: tuple[int, int], tasks: int) -> None:
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mine, _ = ace([base.clone() for _ in range(tasks)], base, preset=preset, gate=gate)
    assert torch.equal(mine, torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_empty_matrices(shape: tuple[int, int]) -> None:
    assert ace([torch.zeros(shape)] * 2)[0].shape == shape


def test_one_row_has_no_centred_part() -> None:
    rows = [torch.randn(1, 20, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    mine, facts = ace(rows)
    assert torch.equal(mine, torch.zeros(1, 20, dtype=torch.float64)) and facts["skipped"] == [0, 1, 2]
    assert error(ace(rows, keep_mean="average")[0], torch.stack(rows).double().mean(0)) <= 1e-6


@pytest.mark.parametrize("shape", [(3, 3), (2, 40), (40, 2), (20, 1)], ids=str)
@pytest.mark.parametrize("preset", ["default", "released"])
def test_at_least_one_direction_is_refined(shape: tuple[int, int], preset: Any) -> None:
    deltas = updates(*shape, UNEQUAL)
    mine, facts = ace(deltas, preset=preset, eps=1e-4, gate="heterogeneous")
    assert facts["k"] == 1 and error(mine, reference(deltas, 1e-4, unequal=True)) <= 1e-4


@pytest.mark.parametrize("shape", [(30, 20), (12, 60)], ids=str)
def test_one_task(shape: tuple[int, int]) -> None:
    delta = updates(*shape, (0.8,))
    mine, facts = ace(delta)
    assert facts["gamma"] == 0.0 and facts["branch"] == "homogeneous"
    assert error(mine, reference(delta)) <= 5e-5
    forced, _ = ace(delta, gate="heterogeneous")
    assert error(forced, reference(delta, unequal=True)) <= 1e-4


@pytest.mark.parametrize("shape", [(30, 20), (12, 60)], ids=str)
@pytest.mark.parametrize("gate", ["homogeneous", "heterogeneous"])
def test_updates_of_low_rank(shape: tuple[int, int], gate: Any) -> None:
    g = torch.Generator().manual_seed(5)
    deltas = [torch.randn(shape[0], 1, generator=g) @ torch.randn(1, shape[1], generator=g) / 10 for _ in range(2)]
    mine, _ = ace(deltas, gate=gate)
    expected = reference(deltas, unequal=gate == "heterogeneous")
    if gate == "homogeneous":
        assert error(mine, expected) <= 1e-4
    else:  # six directions are asked for, three have values that are not rounding: the others are left out
        assert float(mine.norm()) <= 3 * float(expected.norm())


@pytest.mark.parametrize("shape", [(30, 20), (12, 60)], ids=str)
@pytest.mark.parametrize("gate", ["released", "homogeneous", "heterogeneous"])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e8, 1e16, 1e30])
def test_tiny_and_huge_updates(shape: tuple[int, int], gate: Any, size: float) -> None:
    deltas = [d * size for d in updates(*shape, (0.5, 0.6, 0.55))]
    mine, facts = ace(deltas, gate=gate)
    largest = max(float(d.double().norm()) for d in deltas)
    assert 0.05 * largest <= float(mine.norm()) <= 20 * largest
    assert facts["cosine"] > 0.3 and ("eps" in facts) == (size > 1e4)


def test_the_gate_depends_on_the_scale_unless_told_not_to() -> None:
    deltas = updates(30, 20, (1.0, 1.1, 0.9, 1.05))
    gammas = {gate: [ace([c * d for d in deltas], gate=gate)[1]["gamma"] for c in (0.1, 1, 10)] for gate in GATES}
    assert gammas["released"][1] > 1 > 0.1 > gammas["released"][0]
    assert gammas["var_log"] == pytest.approx([gammas["var_log"][0]] * 3, rel=1e-5) and gammas["var_log"][0] < 0.1
    assert ace(deltas, gate="var_log")[1]["branch"] == "homogeneous" != ace(deltas)[1]["branch"]


GATES: tuple[Any, ...] = ("released", "var_log")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_updates_are_refused(bad: float) -> None:
    deltas = updates(30, 20, EQUAL)
    deltas[2][3, 4] = bad
    with pytest.raises(NonFinite, match="ace: w: the update of task 2 has NaN or infinite entries"):
        ace(deltas)


def test_hyperparameters() -> None:
    with pytest.raises(RecipeError, match="keep_mean: average has no meaning with center: false"):
        Ace(center=False, keep_mean="average")
    with pytest.raises(RecipeError, match="eps: must be > 0, got 0"):
        Ace(eps=0)


# Golden files: the released function, run in float32 and in float64.


def goldens() -> list[Any]:
    files = sorted((FOLDER / "ace").glob("*.safetensors"))
    return [pytest.param(path, id=path.stem) for path in files]


@pytest.mark.parametrize("path", goldens())
@pytest.mark.parametrize("preset", ["released", "default"])
def test_golden(path: Any, preset: Any) -> None:
    with safe_open(path, "pt") as f:
        meta = {key: json.loads(value) for key, value in f.metadata().items() if value[:1] in "{["}
        given, floors = meta["params"], meta["fp32_fp64_rel_diff"]
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (not a dict)
    count = len({key.split("/")[0] for key in tensors if key.startswith("task")})
    matrices = list(meta["gamma"])  # the others are averaged
    options = {"preset": preset, "eps": given["eps"], "k_frac": given["k_frac"], "scale": given["scaling_coefficient"]}
    guarded = preset == "default" and "negative" in path.stem
    for name in matrices:
        base = tensors[f"base/{name}"]
        mine, facts = ace([tensors[f"task{t}/{name}"] for t in range(count)], base, **options)
        expected = tensors[f"intermediate/update_fp64/{name}"].double()
        merged = tensors[f"merged/{name}"].double() - base.double()
        assert facts["gamma"] == pytest.approx(meta["gamma"][name], abs=1e-5)
        assert (facts["branch"] == "heterogeneous") == (name in meta["heterogeneous_branch"])
        if guarded:
            assert facts["refinement"] == "skipped: ebar" and error(mine, expected) > 0.5
            continue
        assert error(mine, expected) <= max(1e-5, 10 * floors[name]), name
        assert error(mine, merged) <= max(1e-5, 10 * floors[name]), name
