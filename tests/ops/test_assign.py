from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from pymerge import _C
from pymerge.ops.assign import assign, assign_reference

EPS = 2.0**-52
SHAPES = [
    (0, 3, 3),
    (2, 0, 0),
    (2, 0, 4),
    (2, 4, 0),
    (3, 1, 1),
    (2, 1, 9),
    (2, 5, 5),
    (2, 7, 30),
    (2, 30, 7),
    (1, 65, 65),
]


def scores(shape: tuple[int, ...], seed: int = 0, values: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if values:
        return torch.randint(values, shape, generator=generator).float()
    return torch.randn(shape, generator=generator)


def optimum(score: torch.Tensor, maximize: bool) -> float:
    rows, columns = linear_sum_assignment(score.double().numpy(), maximize)
    return float(score.double()[rows, columns].sum())


def assert_optimal(score: torch.Tensor, maximize: bool, result: tuple[torch.Tensor, ...]) -> None:
    """A matching of scipy's score; prices that bound every score; a gap at rounding level."""
    columns, row_prices, col_prices, value = result
    few, sign = min(score.shape[1:]), -1.0 if maximize else 1.0
    for b in range(len(score)):
        used = columns[b][columns[b] >= 0]
        assert len(used) == len(used.unique()) == few
        rows = (columns[b] >= 0).nonzero().flatten()
        primal = float(score[b].double()[rows, used].sum())
        # the solver's tolerance: 64 eps of the largest score for every row
        allowed = 128 * EPS * (float(score[b].abs().max()) if score[b].numel() else 0.0) * max(score.shape[1:])
        assert abs(primal - optimum(score[b], maximize)) <= allowed
        assert abs(value[b, 0] - primal) <= allowed and abs(value[b, 0] - value[b, 1]) <= allowed
        assert abs(value[b, 2]) <= allowed
        slack = sign * (score[b].double() - row_prices[b, :, None] - col_prices[b])
        assert not slack.numel() or slack.min() >= -allowed


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_scipy_and_reference(shape, maximize):
    for values in (0, 4):  # with 4 values nearly everything is tied
        score = scores(shape, values=values)
        result = assign(score, maximize)
        assert_optimal(score, maximize, result)
        assert_optimal(score, maximize, assign_reference(score, maximize, None, None))
        assert [x.dtype for x in result] == [torch.int64, torch.float64, torch.float64, torch.float64]


@pytest.mark.parametrize("kind", ["uniform", "planted", "integers", "equal", "low_rank", "product"])
def test_large_enough_for_candidate_lists(kind):
    n, g = 1540 if kind in ("uniform", "planted", "integers") else 300, torch.Generator().manual_seed(1)
    planted, some = torch.randn(n, n, generator=g) / 16, 4 * n // 5
    planted[torch.arange(some), torch.randperm(n, generator=g)[:some]] += 0.35
    side = torch.arange(n) / n
    score = {
        "uniform": torch.rand(n, n, generator=g),
        "planted": planted,
        "integers": torch.randint(10, (n, n), generator=g).float(),
        "equal": torch.full((n, n), 0.3),
        "low_rank": torch.randn(n, 8, generator=g) @ torch.randn(8, n, generator=g),
        "product": side[:, None] * side,
    }[kind][None]
    for maximize in (False, True):
        assert_optimal(score, maximize, assign(score, maximize))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_and_strides(dtype):
    score = scores((3, 40, 33)).to(dtype)
    for view in (score, score.mT, score[:, ::2], score[:, :, 1:], score.expand(3, 40, 33)[1:]):
        assert_optimal(view, True, assign(view, True))
        assert torch.equal(assign(view, True)[0], assign(view.contiguous().float(), True)[0])


def test_ties_go_to_the_lowest_index():
    identity = torch.arange(9)
    for maximize in (False, True):
        assert torch.equal(assign(torch.full((1, 9, 9), 2.5), maximize)[0][0], identity)
        assert torch.equal(assign(torch.zeros(1, 9, 14), maximize)[0][0], identity)
        tall = assign(torch.zeros(1, 14, 9), maximize)[0][0]
        assert torch.equal(tall, torch.cat([identity, torch.full((5,), -1)]))


def test_a_batch_gives_what_its_problems_give():
    score = scores((50, 23, 31), seed=3)
    together = assign(score, True)
    for b in range(50):
        assert all(torch.equal(x[b], y[0]) for x, y in zip(together, assign(score[b : b + 1], True), strict=True))


def test_non_finite_problems_are_marked():
    score = scores((5, 6, 6))
    score[1, 2, 3], score[3, 0, 0] = torch.nan, -torch.inf
    for result in (assign(score, True), assign_reference(score, True, None, None)):
        assert torch.equal(torch.isnan(result[3]).all(1), torch.tensor([False, True, False, True, False]))
        assert (result[0][[1, 3]] == -1).all() and torch.isnan(result[1][3]).all() and torch.isnan(result[2][1]).all()
    assert_optimal(score[[0, 2, 4]], True, tuple(x[[0, 2, 4]] for x in assign(score, True)))


@pytest.mark.parametrize("shape", [(2, 40, 40), (2, 20, 50), (1, 300, 300)], ids=str)
def test_warm_start(shape):
    """Any finite prices lead to an optimum; those of the solution itself do so without a change."""
    score = scores(shape, seed=5)
    cold = assign(score, True)
    again = assign(score, True, cold[2])
    assert_optimal(score, True, again)
    assert torch.equal(again[0], cold[0])
    for prices in (torch.zeros(shape[0], shape[2]).double(), scores((shape[0], shape[2])).double() * 3):
        assert_optimal(score, True, assign(score, True, prices))
    moved = score + 0.01 * scores(shape, seed=6)
    assert_optimal(moved, True, assign(moved, True, cold[2]))


def test_extreme_scores():
    score = scores((4, 17, 17))
    for scale in (1e-38, 1e38, 1e30):
        assert_optimal(score.clamp(-3, 3) * scale, True, assign(score.clamp(-3, 3) * scale, True))
    wide = score * 10.0 ** torch.randint(-30, 30, score.shape, generator=torch.Generator().manual_seed(0))
    assert_optimal(wide, False, assign(wide, False))


def test_opcheck():
    op = torch.ops.pymerge.assign.default
    torch.library.opcheck(op, (scores((2, 4, 6)), True, None, None))
    torch.library.opcheck(op, (scores((2, 6, 4)).bfloat16(), False, None, 0.5))
    torch.library.opcheck(op, (scores((2, 3, 3)), False, torch.zeros(2, 3, dtype=torch.float64), None))
    torch.library.opcheck(op, (torch.empty(0, 3, 3), True, None, None))


def test_compiles_to_one_graph():
    score = scores((2, 5, 8))
    compiled = torch.compile(lambda s: assign(s * 2, True), backend="aot_eager", fullgraph=True)
    for x, y in zip(compiled(score), assign(score * 2, True), strict=True):
        assert torch.equal(x, y)


def test_bad_arguments():
    score = scores((2, 3, 4))
    for arguments, message in [
        ((score[0], True), r"score must be \[B, n, m\], got \[3, 4\]"),
        ((score.double(), True), "score must be bfloat16, float16 or float32, got Double"),
        ((score.long(), True), "score must be bfloat16"),
        ((score, True, torch.zeros(2, 4)), r"prices must be float64 \[2, 4\], got Float \[2, 4\]"),
        ((score, True, torch.zeros(2, 3).double()), r"prices must be float64 \[2, 4\], got Double \[2, 3\]"),
        ((score, True, None, -1.0), "tolerance must be at least 0, got -1"),
        ((score, True, None, float("nan")), "tolerance must be at least 0"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            assign(*arguments)


def test_malformed_calls_only_raise():
    rng = random.Random(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64]

    def tensor() -> object:
        shape = [rng.choice([0, 1, 2, 3]) for _ in range(rng.choice([0, 1, 2, 3, 3, 3, 4]))]
        x = torch.zeros(shape, dtype=rng.choice(dtypes), device=rng.choice(["cpu", "cpu", "cpu", "meta"]))
        return rng.choice([x, x, x, x.to_sparse() if x.device.type == "cpu" and x.dim() else x, None, "x", [x]])

    for _ in range(1000):
        arguments = [tensor(), rng.choice([True, 0, None, "a", 2.5]), tensor(), rng.choice([None, 1.0, -1.0, "b"])]
        try:
            result = torch.ops.pymerge.assign(*arguments[: rng.choice([2, 3, 4, 4, 4])])
        except Exception:  # any, but no crash
            continue
        assert result[0].dtype == torch.int64


DIGEST = """
import torch
from pymerge import _C
from pymerge.ops.assign import assign
g, crc = torch.Generator().manual_seed(0), 0
for shape in ((40, 17, 17), (3, 64, 81), (2, 90, 33), (1, 1540, 1540)):
    for score in (torch.randn(shape, generator=g), torch.randint(5, shape, generator=g).float()):
        for maximize in (False, True):
            for x in assign(score, maximize):
                crc = _C.crc32c(x.view(torch.uint8).numpy(), crc)
print(_C.cpu_level(), crc)
"""


def test_every_cpu_level_and_thread_count_gives_the_same_bits():
    outputs = set()
    for level in ("baseline", "avx2", "avx512"):
        if level != "baseline" and not _C.cpu_features()[level]:
            continue
        path = os.pathsep.join([str(Path.cwd()), *sys.path])
        threads = "1" if level == "avx2" else "2"
        environment = {**os.environ, "PYMERGE_CPU": level, "PYTHONPATH": path, "OMP_NUM_THREADS": threads}
        run = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True
        )
        name, crc = run.stdout.split()
        assert name == level
        outputs.add(crc)
    assert len(outputs) == 1
