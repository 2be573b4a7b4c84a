"""A thin random image of a matrix: A Omega, with Omega made inside the operator from counters."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.library import impl, register_fake

from pymerge.ops import _load  # noqa: F401
from pymerge.ops._foreign import takes_arrays
from pymerge.ops._random import philox4x32

KINDS = ("gaussian", "sparse_sign")
NONZEROS = 8  # of a sparse row
MAX_WIDTH = NONZEROS << 15
_LOG = (  # Cephes' logf, as the native code has it
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
    2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip


def _log_unit(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).view(torch.float32)
    low = mantissa < 0.707106781186547524
    exponent = ((bits >> 23) - torch.where(low, 127, 126)).float()
    f = torch.where(low, mantissa + mantissa, mantissa) - 1.0
    z = f * f
    p = torch.full_like(f, _LOG[0])
    for coefficient in _LOG[1:]:
        p = p * f + coefficient
    p = p * f * z
    p = p + exponent * -2.12194440e-4
    p = p - 0.5 * z
    return (f + p) + exponent * 0.693359375


def _normal_pair(size: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Box-Muller of two 32-bit words (in int64)."""
    u = ((size >> 8) + 1).float() * 2.0**-24
    radius = (-2.0 * _log_unit(u)).double().sqrt().float()  # float32's sqrt is not the nearest number on every device
    t = (((turn & 0x3FFFFFFF) >> 6) - (1 << 23)).float()
    angle = t * torch.tensor(math.pi / 2, dtype=torch.float32, device=t.device).mul(2.0**-24)
    z = angle * angle
    s = (-1.9515295891e-4 * z + 8.3321608736e-3) * z + -1.6666654611e-1
    s = s * z * angle + angle
    c = (2.443315711809948e-5 * z + -1.388731625493765e-3) * z + 4.166664568298827e-2
    c = c * z * z - 0.5 * z + 1.0
    swap, radius = (turn & 0x40000000) != 0, torch.where((turn & 0x80000000) != 0, -radius, radius)
    return radius * torch.where(swap, -s, c), radius * torch.where(swap, c, s)


def gaussian_matrix(n: int, width: int, seed: int, device: torch.device) -> Tensor:
    """The Gaussian Omega, float32 [n, width]."""
    groups = (width + 3) // 4
    index = (torch.arange(n, device=device)[:, None] << 32) | torch.arange(groups, device=device)  # [n, groups]
    w = philox4x32(seed, index, 3)
    quads = torch.stack([*_normal_pair(w[0], w[1]), *_normal_pair(w[2], w[3])], dim=-1)
    return quads.reshape(n, 4 * groups)[:, :width].contiguous()


def sparse_entries(n: int, width: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Columns (int64) and signs (+-1, float32) of the entries of the sparse Omega, each [n, min(8, width)]."""
    segments = min(NONZEROS, width)
    edges = torch.arange(segments + 1, device=device) * width // segments
    words = torch.stack(philox4x32(seed, torch.arange(n, device=device), 2), dim=-1)  # [n, 4]
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).reshape(n, NONZEROS)[:, :segments]
    columns = edges[:-1] + (((halves & 0x7FFF) * (edges[1:] - edges[:-1])) >> 15)
    return columns, 1.0 - 2.0 * (halves >> 15).float()


def sketch_reference(a: Tensor, width: int, kind: str, seed: int) -> Tensor:
    if a.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise RuntimeError(f"pymerge::sketch: a must be bfloat16, float16, float32 or float64, got {a.dtype}")
    if a.dim() < 2 or not 1 <= width <= MAX_WIDTH or kind not in KINDS:
        raise RuntimeError(f"pymerge::sketch: bad a {list(a.shape)}, width {width} or kind {kind!r}")
    x = a if a.dtype == torch.float64 else a.float()
    n = a.shape[-1]
    if kind == "gaussian":
        return x @ gaussian_matrix(n, width, seed, a.device).to(x.dtype)
    columns, signs = sparse_entries(n, width, seed, a.device)
    y = x.new_zeros((*a.shape[:-1], width))
    for j in range(n):  # in this order: the sums have the bits of the native kernels
        y[..., columns[j]] += x[..., j : j + 1] * signs[j].to(x.dtype)
    return y * torch.tensor(1.0 / math.sqrt(columns.shape[1]), dtype=x.dtype, device=a.device)


impl("pymerge::sketch", "CompositeExplicitAutograd", sketch_reference)


@register_fake("pymerge::sketch")
def _(a, width, kind, seed):
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return a.new_empty((*a.shape[:-1], width), dtype=dtype)


@takes_arrays
def sketch(a: Tensor, width: int, *, kind: str = "sparse_sign", seed: int = 0) -> Tensor:
    """A Omega, Omega [n, width] random, a function of (seed, row, column) alone (Philox4x32-7), the same for each
    matrix of a batch.

    a        [..., m, n], bfloat16, float16, float32 or float64; any strides
    kind     sparse_sign: 8 entries +-1/sqrt(8) in each row of Omega, one in each eighth of the columns (width of them
             where width < 8); gaussian: independent, mean 0, variance 1 (Box-Muller, |x| <= 5.8)
    seed     64 bits, negative numbers included
    Returns  [..., m, width], float32 (float64 for float64)
    Error    sparse_sign: the same bits on every device, thread count and batch. gaussian: Omega has the same bits
             everywhere, the product is the device's matmul: within n eps sum_j |a_ij omega_jc|.
    Cost     sparse_sign: 8 m n additions, A read once; gaussian: 2 m n width and an [n, width] matrix.
    Raises   RuntimeError (dtype, dimensions, width outside 1..262144, kind).
    Source   arXiv 1211.1002 (OSNAP, block form); Box and Muller 1958."""
    return torch.ops.pymerge.sketch(a, width, kind, seed)
