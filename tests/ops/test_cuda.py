"""Every operator on CUDA against the same operator on the CPU: the same bits (float64 sums: 1e-12)."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.device
torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)

from pymerge.ops import OPERATORS, implementations  # noqa: E402

for name in OPERATORS:
    importlib.import_module(f"pymerge.ops.{name}")
OPS = torch.ops.pymerge
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
KEYS = [0x1234567 * (t + 3) ** 5 for t in range(40)]
NO_CUTS = {"row_length": 0, "top_theta": None, "top_index": None, "skip_theta": None, "skip_index": None}
NO_MASK = {"keep": None, "keys": None}
PLAIN = {"scale": 1.0, "divisor": 1.0, "rescales": None, "elect": False, "tie_sign": 1, "norm": "none"}
SHAPES = [(0,), (1,), (8,), (3, 5), (129, 1025), (1 << 20,)]


def on(device: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return [on(device, one) for one in value] if isinstance(value, list) else value


def both(op: Callable, *args: Any, **kwargs: Any) -> list[tuple[Any, Any]]:
    """(CPU result, CUDA result moved to the CPU), for each of the operator's results."""
    sides = [
        op(*[on(device, a) for a in args], **{k: on(device, v) for k, v in kwargs.items()})
        for device in ("cpu", "cuda")
    ]
    results = [(side,) if isinstance(side, torch.Tensor) else side for side in sides]
    return [(cpu, cuda.cpu()) for cpu, cuda in zip(*results, strict=True)]


def assert_same_bits(pairs: list[tuple[Any, Any]]) -> None:
    for cpu, cuda in pairs:
        assert cpu.dtype == cuda.dtype and cpu.shape == cuda.shape
        assert torch.equal(cpu.contiguous().view(torch.uint8), cuda.contiguous().view(torch.uint8))


def bits_equal(pairs: list[tuple[Any, Any]]) -> None:
    assert_same_bits([(cpu.reshape(-1), cuda.reshape(-1)) for cpu, cuda in pairs])


def tensors(shape: tuple[int, ...], dtypes: list, base: Any = BF16, seed: int = 0):
    """A base and tensors near it, rounded so that many deltas are equal and some are zero."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=g)
    tuned = [(start + (torch.randn(shape, generator=g) * 4).round() / 64).to(dtype) for dtype in dtypes]
    return start.to(base), tuned


def cuts(base: Any, tuned: list[Any], row_length: int) -> dict[str, Any]:
    length = row_length or tuned[0].numel()
    top = OPS.delta_kth(base, tuned, [length // 2, length // 3, length][: len(tuned)], row_length, None, None)
    skip = OPS.delta_kth(base, tuned, [length // 10, 0, 1][: len(tuned)], row_length, None, None)
    return {
        "row_length": row_length,
        "top_theta": top[0],
        "top_index": top[1],
        "skip_theta": skip[0],
        "skip_index": skip[1],
    }


def test_every_operator_has_a_native_kernel():
    assert {name for name, runs in implementations().items() if runs["cuda"] != "reference"} == set(OPERATORS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("out_dtype", [BF16, F16, F32, F64], ids=str)
def test_linear_merge(shape, dtype, out_dtype):
    base, tuned = tensors(shape, [dtype] * 3, dtype)
    args = {**PLAIN, **NO_CUTS, **NO_MASK, "weights": [0.3, -0.7, 1.1], "scale": 0.9, "divisor": 1.7}
    bits_equal(both(OPS.delta_merge, base, tuned, base, out_dtype=out_dtype, **args))
    bits_equal(both(OPS.delta_merge, None, tuned, None, out_dtype=out_dtype, **args))


@pytest.mark.parametrize("dtypes", [[BF16, F32, F16], [F64, BF16, F32]], ids=str)
def test_merge_of_mixed_dtypes_and_strides(dtypes):
    base, tuned = tensors((257, 130), dtypes, F32)
    args = {**PLAIN, **NO_CUTS, **NO_MASK, "weights": [0.3, -0.7, 1.1]}
    bits_equal(both(OPS.delta_merge, base, tuned, base.half(), out_dtype=BF16, **args))
    turned = [x.t() for x in tuned]
    bits_equal(both(OPS.delta_merge, base.t(), turned, base.t(), out_dtype=F32, **args))
    odd = [x[1:, :] if x.dtype == F64 else x.reshape(-1)[130:].reshape(256, 130) for x in tuned]
    bits_equal(both(OPS.delta_merge, base[1:], odd, None, out_dtype=F16, **args))


@pytest.mark.parametrize("norm", ["none", "weights", "count", "max"])
@pytest.mark.parametrize("row_length", [0, 5, 1025])
@pytest.mark.parametrize("keep", [None, [0.5, 0.01, 1.0]], ids=["whole", "masked"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_elected_merge(norm, row_length, keep, dtype):
    base, tuned = tensors((129, 1025), [dtype] * 3, dtype)
    mask = {"keep": keep, "keys": KEYS[:3]} if keep else NO_MASK
    args = {**PLAIN, **cuts(base, tuned, row_length), **mask, "weights": [1.0, 0.5, 2.0], "rescales": [1.0, 3.0, 0.5]}
    args |= {"elect": True, "tie_sign": -1, "norm": norm}
    bits_equal(both(OPS.delta_merge, base, tuned, base, out_dtype=dtype, **args))


def test_merge_of_many_tasks():
    base, tuned = tensors((64, 100), [BF16] * 40)
    args = {**PLAIN, **NO_CUTS, "weights": [0.1 * t for t in range(40)], "keep": [0.5] * 40, "keys": KEYS}
    bits_equal(both(OPS.delta_merge, base, tuned, base, out_dtype=BF16, **args))
    bits_equal(both(OPS.delta_merge, base, tuned, base, out_dtype=F32, **(args | {"elect": True, "norm": "count"})))


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_merge_counts_what_is_not_finite(dtype):
    base, tuned = tensors((50, 1001), [dtype] * 2, dtype)
    base.view(-1)[[3, 50_000]] = math.nan
    tuned[1].view(-1)[[3, 4, 20_000]] = torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype)
    args = {**PLAIN, **NO_CUTS, "weights": [3e4, 1.0], "keep": [0.5, 0.0], "keys": KEYS[:2]}
    results = both(OPS.delta_merge, base, tuned, base, out_dtype=F16, **args)
    bits_equal(results)
    assert results[1][1][:4].tolist() == [2, 0, 3, 0] and results[1][1][4] >= 2
    bits_equal(both(OPS.delta_merge, base, tuned, tuned[1], out_dtype=dtype, **args))


@pytest.mark.parametrize("n", [1, 1000, 1 << 16, (1 << 16) + 1, 3_000_001])
@pytest.mark.parametrize("keep", [None, [0.5, 0.01, 1.0]], ids=["whole", "masked"])
def test_kth_of_one_row(n, keep):
    base, tuned = tensors((n,), [BF16, F32, F16])
    mask = {"keep": keep, "keys": KEYS[:3]} if keep else NO_MASK
    for ranks in ([1, n // 2, n - 1], [0, n, n // 7], [-3, n + 3, n // 100]):
        bits_equal(both(OPS.delta_kth, base, tuned, ranks, 0, **mask))


@pytest.mark.parametrize("shape", [(1, 3), (300, 1), (129, 1025), (7, 100_003)], ids=str)
@pytest.mark.parametrize("keep", [None, [0.5, 0.01]], ids=["whole", "masked"])
def test_kth_of_rows(shape, keep):
    base, tuned = tensors(shape, [BF16, F32])
    mask = {"keep": keep, "keys": KEYS[:2]} if keep else NO_MASK
    for ranks in ([1, shape[1] // 2], [shape[1] - 1, shape[1]]):
        bits_equal(both(OPS.delta_kth, base, tuned, ranks, shape[1], **mask))


def test_kth_needs_all_bits_and_knows_zeros():
    close = 1.0 + torch.randint(0, 1 << 15, (1 << 20,)) * 2.0**-23  # one bin of the first level
    sparse = torch.zeros(1 << 20)
    sparse[::1000] = 1.0
    for rank in (1, 500, 1 << 19, (1 << 20) - 1):
        bits_equal(both(OPS.delta_kth, None, [close, sparse], [rank, rank], 0, **NO_MASK))


@pytest.mark.parametrize("prefix", [None, [0x7800, 0x7980]], ids=["coarse", "fine"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_histogram(prefix, scale):
    base, tuned = tensors((1_000_003,), [BF16, F32])
    tuned = [x * scale for x in tuned]
    bits_equal(both(OPS.delta_histogram, base, tuned, [0.5, 1.0], KEYS[:2], prefix))
    bits_equal(both(OPS.delta_histogram, None, tuned, None, None, prefix))


@pytest.mark.parametrize("shape", [(0,), (7,), (129, 1025), (2_500_000,)], ids=str)
def test_sums(shape):
    base, tuned = tensors(shape, [BF16, F32, F16])
    selection = cuts(base, tuned, 0) if shape != (0,) else NO_CUTS
    mask = {"keep": [0.5, 0.01, 1.0], "keys": KEYS[:3]}
    for cpu, cuda in both(OPS.delta_l1, base, tuned, **mask, **selection):
        torch.testing.assert_close(cuda, cpu, rtol=1e-12, atol=0)
    for cpu, cuda in both(OPS.delta_gram, base, tuned):
        scale = cpu.diagonal().sqrt()
        assert ((cuda - cpu).abs() <= 1e-12 * scale[:, None] * scale[None, :]).all() and torch.equal(cuda, cuda.t())
    weights = {"weights": [1.0, -0.5, 0.7], "rescales": [2.0, 1.0, 1.0]}
    bits_equal(both(OPS.delta_signs, base, tuned, **weights, **mask, **selection))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
def test_finite_cast(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e5  # half overflow float16
    if x.numel() > 10:
        x.view(-1)[:5] = torch.tensor([math.inf, -math.inf, math.nan, 3.4e38, 1e-42])
    bits_equal(both(OPS.finite_cast, x, dtype))


@pytest.mark.parametrize("shape", [(0, 3), (5, 1), (300, 70), (4000, 129), (3, 257, 64), (2, 2, 40, 33)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
def test_gram64(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for one in (x, x.mT, x[..., ::2]):
        (cpu, cuda), *_ = both(OPS.gram64, one)
        size = OPS.gram64(one.abs())
        assert ((cuda - cpu).abs() <= max(one.shape[-2], 1) * 2.0**-52 * size).all()
        assert torch.equal(cuda, cuda.mT)


def test_the_same_bits_each_time():
    base, tuned = (on("cuda", x) for x in tensors((3_000_000,), [BF16] * 2))
    calls = [lambda: OPS.delta_l1(base, tuned, **NO_MASK, **NO_CUTS), lambda: OPS.delta_gram(base, tuned)]
    for call in calls:
        first = call()
        assert all(torch.equal(first, call()) for _ in range(5))


def test_entries_beyond_2_to_the_31():
    n = (1 << 31) + 1029
    if torch.cuda.mem_get_info()[0] < 16 * n:
        pytest.skip(f"needs {16 * n / 2**30:.0f} GiB of free device memory")
    x = torch.zeros(n, dtype=BF16, device="cuda")
    x[-7:] = torch.arange(1, 8, dtype=BF16)
    args = {**PLAIN, **NO_CUTS, **NO_MASK, "weights": [2.0]}
    out, bad = OPS.delta_merge(None, [x], x, out_dtype=BF16, **args)
    assert out[-8:].tolist() == [0.0, 3.0, 6.0, 9.0, 12.0, 15.0, 18.0, 21.0] and bad.tolist() == [0, 0, 0, 0]
    theta, index = OPS.delta_kth(None, [x], [3], 0, **NO_MASK)
    assert (theta.item(), index.item()) == (5.0, n - 2)
    theta, index = OPS.delta_kth(None, [x], [8 + (1 << 31)], 0, **NO_MASK)
    assert (theta.item(), index.item()) == (0.0, (1 << 31) + 1)
    hist = OPS.delta_histogram(None, [x], None, None, None)
    assert hist.sum().item() == n and hist[0, 0].item() == n - 7


def test_opcheck():
    base, tuned = (on("cuda", x) for x in tensors((33, 65), [BF16] * 2))
    args = {**PLAIN, **NO_CUTS, **NO_MASK, "weights": [1.0, 2.0], "out_dtype": BF16}
    torch.library.opcheck(OPS.delta_merge.default, (base, tuned, base), args)
    torch.library.opcheck(OPS.delta_kth.default, (base, tuned, [3, 4], 0, None, None))
    torch.library.opcheck(OPS.finite_cast.default, (base.float(), BF16))


def test_runs_on_the_current_stream_without_waiting_for_the_host():
    base, tuned = (on("cuda", x) for x in tensors((1 << 20,), [BF16] * 2))
    args = {**PLAIN, **NO_CUTS, **NO_MASK, "weights": [1.0, 2.0], "out_dtype": BF16}
    want = OPS.delta_merge(base, tuned, base, **args)[0], OPS.delta_kth(base, tuned, [5000, 70_000], 0, **NO_MASK)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a host synchronisation or the wrong stream fails here
        out = OPS.delta_merge(base, tuned, base, **args)[0]
        theta, index = OPS.delta_kth(base, tuned, [5000, 70_000], 0, **NO_MASK)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want[0]) and torch.equal(theta, want[1][0]) and torch.equal(index, want[1][1])


def test_messages_name_the_values():
    base, tuned = (on("cuda", x) for x in tensors((3, 5), [BF16] * 2))
    with pytest.raises(RuntimeError, match="row_length must divide 15, got 4"):
        OPS.delta_kth(base, tuned, [1, 1], 4, **NO_MASK)
    with pytest.raises(RuntimeError, match="different devices"):
        OPS.delta_gram(base.cpu(), tuned)
    with pytest.raises(RuntimeError, match="x must be float32"):
        OPS.finite_cast(base, BF16)
