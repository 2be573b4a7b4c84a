from __future__ import annotations

import math
import random

import pytest
import torch

from pymerge.ops.sketch import KINDS, gaussian_matrix, sketch, sketch_reference, sparse_entries

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [((0, 5), 3), ((5, 0), 3), ((1, 1), 1), ((33, 70), 20), ((2, 3, 17, 65), 5), ((40, 130), 77)]


def random_matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, width", SHAPES, ids=str)
def test_sparse_has_the_bits_of_the_reference(shape, width, dtype):
    a = random_matrix(*shape).to(dtype)
    expected = sketch_reference(a, width, "sparse_sign", -7)
    assert expected.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for x in (a, a.mT.contiguous().mT):
        assert torch.equal(sketch(x, width, seed=-7), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, width", SHAPES, ids=str)
def test_gaussian_against_float64(shape, width, dtype):
    a = random_matrix(*shape).to(dtype)
    omega = gaussian_matrix(shape[-1], width, 11, a.device).double()
    for x in (a, a.mT.contiguous().mT):
        y = sketch(x, width, kind="gaussian", seed=11)
        bound = torch.finfo(y.dtype).eps * shape[-1] * (a.double().abs() @ omega.abs())
        assert ((y.double() - a.double() @ omega).abs() <= bound).all()


def test_sparse_against_float64():
    a = random_matrix(40, 300)
    columns, signs = sparse_entries(300, 64, 5, a.device)
    omega = torch.zeros(300, 64, dtype=torch.float64).scatter_(1, columns, signs.double() / math.sqrt(8))
    bound = torch.finfo(torch.float32).eps * 300 * (a.double().abs() @ omega.abs())
    assert ((sketch(a, 64, seed=5).double() - a.double() @ omega).abs() <= bound).all()
    assert (omega != 0).sum(1).eq(8).all()  # all in different columns


def test_omega_has_the_bits_of_the_reference():
    assert torch.equal(
        sketch(torch.eye(300), 65, kind="gaussian", seed=3), gaussian_matrix(300, 65, 3, torch.device("cpu"))
    )


def test_gaussian_moments():
    """Within 5 standard errors of those of the normal distribution; columns and neighbours are uncorrelated."""
    x = gaussian_matrix(1000, 1001, 3, torch.device("cpu")).double()
    n = x.numel()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - mean) < 5 * math.sqrt(variance / n)
    assert abs(float((x[:, 1:] * x[:, :-1]).mean())) < 5 / math.sqrt(n)
    assert abs(float((x[1:] * x[:-1]).mean())) < 5 / math.sqrt(n)


@pytest.mark.parametrize("kind", KINDS)
def test_sketch_keeps_lengths(kind):
    """E ||a Omega||^2 = width / n_nonzero-normalised ||a||^2: 1 for sparse rows of unit length, width for Gaussian."""
    a = random_matrix(4000, 50, seed=2)
    y = sketch(a.mT.contiguous(), 400, kind=kind, seed=9)
    scale = 1.0 if kind == "sparse_sign" else 400.0
    ratio = y.square().sum(1) / (a.square().sum(0) * scale)
    assert (ratio - 1).abs().max() < 6 * math.sqrt(2 / 400)


def test_seed_and_batch():
    a = random_matrix(3, 40, 60)
    for kind in KINDS:
        whole = sketch(a, 9, kind=kind, seed=1)
        assert not torch.equal(whole, sketch(a, 9, kind=kind, seed=2))
        assert torch.equal(whole, sketch(a, 9, kind=kind, seed=1))
    whole = sketch(a, 9, seed=1)
    assert all(torch.equal(whole[i], sketch(a[i], 9, seed=1)) for i in range(3))


def test_threads_do_not_show():
    a, before = random_matrix(1200, 90), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = sketch(a, 33)
        torch.set_num_threads(2)
        assert torch.equal(one, sketch(a, 33))
    finally:
        torch.set_num_threads(before)


def test_opcheck_and_compile():
    for kind in KINDS:
        for a in (random_matrix(9, 7), torch.empty(2, 0, 4, dtype=torch.float64), random_matrix(9, 7).mT.bfloat16()):
            torch.library.opcheck(torch.ops.pymerge.sketch.default, (a, 5, kind, 3))
    a = random_matrix(20, 30)
    compiled = torch.compile(lambda x: sketch(x, 6, seed=4) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a), sketch(a, 6, seed=4) * 2)


def test_bad_arguments():
    a = random_matrix(4, 5)
    for args, message in (
        ((a.int(), 3, "gaussian", 0), "a must be bfloat16"),
        ((a[0], 3, "gaussian", 0), r"a must be \[..., m, n\], got \[5\]"),
        ((a, 0, "gaussian", 0), "width must be in 1..262144, got 0"),
        ((a, 262145, "gaussian", 0), "width must be in"),
        ((a, 3, "uniform", 0), "kind must be gaussian or sparse_sign, got 'uniform'"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.pymerge.sketch(*args)


def test_malformed_calls_raise():
    """1000 calls with arguments drawn from good and bad ones: a result of the right shape, or an exception."""
    draw = random.Random(0)
    tensors = [random_matrix(4, 5), random_matrix(3), torch.tensor(1.0), torch.empty(0, 3), torch.zeros(2, 3).int(),
               torch.zeros(2, 2, dtype=torch.complex64), random_matrix(2, 3, 4).double(), None, "a", [1.0]]  # fmt: skip
    widths = [1, 3, 9, 0, -1, 2**40, 2**70, 1.5, None, "3"]
    kinds = [*KINDS, "", "Gaussian", None, 3]
    seeds = [0, -1, 2**63 - 1, 2**63, -(2**63), 2**64, 0.5, None]
    for _ in range(1000):
        a, width, kind, seed = (draw.choice(x) for x in (tensors, widths, kinds, seeds))
        try:
            y = torch.ops.pymerge.sketch(a, width, kind, seed)
        except (RuntimeError, TypeError, ValueError, OverflowError, AttributeError):
            continue
        assert y.shape == (*a.shape[:-1], width) and kind in KINDS


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, width", SHAPES, ids=str)
def test_cuda(shape, width, dtype):
    """The bits of the CPU; the Gaussian product within its bound."""
    a = random_matrix(*shape).to(dtype)
    assert torch.equal(sketch(a.cuda(), width, seed=3).cpu(), sketch(a, width, seed=3))
    eye = torch.eye(20)
    omega = sketch(eye.cuda(), width, kind="gaussian", seed=3).cpu()
    assert torch.equal(omega, sketch(eye, width, kind="gaussian", seed=3))
    y, expected = (sketch(x, width, kind="gaussian", seed=3).cpu().double() for x in (a.cuda(), a))
    bound = 12.0 * torch.finfo(sketch(a, width).dtype).eps * shape[-1] * a.double().abs().sum(-1, keepdim=True)
    assert ((y - expected).abs() <= bound).all()
