"""cov_accumulate on CUDA against float64 and against itself."""

import pytest

pytestmark = pytest.mark.device
torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)

from pymerge.ops.cov_accumulate import cov_accumulate, cov_mirror_  # noqa: E402

OP = torch.ops.pymerge.cov_accumulate
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = [(0, 3), (3, 0), (1, 1), (5, 7), (1100, 145), (3000, 1024), (20_000, 264)]


def sample(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def check(cov, start, x, *, alpha=1.0, mask=None, small=False, precision="float32"):
    """Three tf32 products miss 3 * 2^-22 of theirs; tensor cores cut sums of 128 rows instead of rounding them."""
    used = x.double() if mask is None else torch.where(mask.unsqueeze(-1), x.double(), 0.0)
    used = used.mT if small else used
    exact, size = used.mT @ used, used.abs().mT @ used.abs()
    wide = precision == "float64" or x.dtype == F64
    unit, split = (2.0**-53, 0.0) if wide else (2.0**-24, 3 * 2.0**-22 if x.dtype == F32 else 0.0)
    runs = used.shape[-2] // 8192 + 3
    stored = runs * (2.0**-24 if cov.dtype == F32 else 2.0**-53) * (start.double().abs() + abs(alpha) * size)
    bound = abs(alpha) * ((2 * min(used.shape[-2], 128) + used.shape[-2] / 128) * unit + split) * size + stored
    if wide:
        bound = abs(alpha) * used.shape[-2] * unit * size * 2 + stored
    upper = torch.ones_like(cov, dtype=torch.bool).triu()
    assert ((cov.double() - start.double() - alpha * exact).abs() <= bound)[upper].all()
    assert torch.equal(cov.tril(-1), start.tril(-1))


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("small", [False, True], ids=["columns", "small"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_against_float64(dtype, shape, small, precision):
    x = sample(shape[::-1] if small else shape, dtype)
    size = shape[1]
    for totals in (F32, F64):
        start = sample((size, size), totals, 1)
        cov = start.clone()
        cov_accumulate(cov, x, alpha=0.3, small=small, precision=precision)
        check(cov, start, x, alpha=0.3, small=small, precision=precision)


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
@pytest.mark.parametrize("small", [False, True], ids=["columns", "small"])
def test_masks_and_batches(dtype, small):
    x = sample((3, 130, 96), dtype)
    mask = torch.rand(3, 130, generator=torch.Generator().manual_seed(2)).cuda() < 0.6
    x[~mask] = torch.nan
    start = torch.zeros(3, 130, 130, device="cuda") if small else torch.zeros(3, 96, 96, device="cuda")
    cov = start.clone()
    cov_accumulate(cov, x, mask=mask, small=small)
    check(cov, start, x, mask=mask, small=small)


def test_strides_change_nothing():
    wide = sample((260, 300), BF16)
    for x in (wide[::2], wide[:, ::3], wide[1:, 1:], wide.mT, wide[:, 8:136]):
        cov, plain = (torch.zeros(x.shape[1], x.shape[1], device="cuda") for _ in range(2))
        cov_accumulate(cov, x)
        cov_accumulate(plain, x.contiguous())
        assert torch.equal(cov, plain)


def test_error_of_long_sums():
    for dtype, most in ((BF16, 1e-6), (F16, 1e-6), (F32, 5e-6)):
        x = sample((8192, 512), dtype)
        cov, exact = torch.zeros(512, 512, device="cuda"), torch.triu(x.double().mT @ x.double())
        cov_accumulate(cov, x)
        assert (cov - exact).norm() <= most * exact.norm()


def test_the_same_bits_each_time_and_in_a_graph():
    x = sample((5000, 200), BF16)
    first = torch.zeros(200, 200, device="cuda")
    cov_accumulate(first, x)
    cov = torch.zeros_like(first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a host synchronisation or the wrong stream fails here
        cov_accumulate(cov, x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(cov, first)
    assert torch.equal(cov_mirror_(cov), torch.triu(first) + torch.triu(first, 1).mT)


def test_opcheck_and_messages():
    x = sample((5, 4), BF16)
    torch.library.opcheck(OP.default, (torch.zeros(4, 4, device="cuda"), x))
    with pytest.raises(RuntimeError, match="different devices"):
        OP(torch.zeros(4, 4), x)
