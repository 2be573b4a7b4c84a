"""Small calls of every operator that has a CUDA kernel: odd sizes, partial blocks, each path of each kernel once.

    python benchmarks/device_calls.py --device cuda      what gpu_check.sh runs under compute-sanitizer

tests/ops/test_device_calls.py compares the devices on the same calls and checks that no operator is missing here.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pymerge.ops import OPERATORS

OPS = torch.ops.pymerge
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
Results = list[Tensor]  # what must agree between devices
Make = Callable[..., Tensor]
NO_CUTS = {"row_length": 0, "top_theta": None, "top_index": None, "skip_theta": None, "skip_index": None}
NO_MASK = {"keep": None, "keys": None}
MASK = {"keep": [0.5, 0.1], "keys": [3, 4]}


def maker(device: str) -> Make:
    """Random tensors, the same on every device."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = F32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

    return make


def pair(make: Make, *shape: int, dtype: torch.dtype = BF16) -> tuple[Tensor, list[Tensor]]:
    base = make(*shape)
    tuned = [(base + (make(*shape) * 4).round() / 64).to(dtype) for _ in range(2)]
    return base.to(dtype), tuned


def merges(make: Make) -> Iterator[Tensor]:
    plain = {"weights": [0.5, 2.0], "scale": 0.9, "divisor": 1.0, "rescales": None, "tie_sign": 1}
    for dtype in (BF16, F16, F32):
        base, tuned = pair(make, 3, 1003, dtype=dtype)
        yield from OPS.delta_merge(
            base, tuned, base, out_dtype=dtype, elect=False, norm="none", **plain, **NO_MASK, **NO_CUTS
        )
    base, tuned = pair(make, 77)
    yield from OPS.delta_merge(base, tuned, None, out_dtype=F64, elect=True, norm="count", **plain, **MASK, **NO_CUTS)
    many = {**plain, "weights": [0.1] * 40}
    yield from OPS.delta_merge(
        base, tuned * 20, base, out_dtype=BF16, elect=True, norm="max", **many, **NO_MASK, **NO_CUTS
    )


def kths(make: Make) -> Iterator[Tensor]:
    for shape, row_length in (((3, 1003), 1003), ((5000,), 0), ((70_001,), 0)):
        base, tuned = pair(make, *shape)
        yield from OPS.delta_kth(base, tuned, [7, 400], row_length, None, None)
    yield from OPS.delta_kth(*pair(make, 70_001), [7, 400], 0, MASK["keep"], MASK["keys"])


def histograms(make: Make) -> Iterator[Tensor]:
    base, tuned = pair(make, 70_001)
    yield OPS.delta_histogram(base, tuned, None, None, None)
    yield OPS.delta_histogram(base, tuned, MASK["keep"], MASK["keys"], [0x7800, 0x7980])


def sums(make: Make) -> Iterator[Tensor]:
    base, tuned = pair(make, 33_001)
    yield OPS.delta_l1(base, tuned, **MASK, **NO_CUTS)


def grams(make: Make) -> Iterator[Tensor]:
    yield OPS.delta_gram(*pair(make, 33_001))


def signs(make: Make) -> Iterator[Tensor]:
    base, tuned = pair(make, 33_001)
    yield OPS.delta_signs(base, tuned, weights=[1.0, -0.5], rescales=None, **MASK, **NO_CUTS)


def casts(make: Make) -> Iterator[Tensor]:
    for dtype in (BF16, F16, F32, F64):
        yield from OPS.finite_cast(make(3, 1003, scale=1e5), dtype)


def projections(make: Make) -> Iterator[Tensor]:
    for precision in ("fp32", "bf16x3"):
        for m, n, r, dtype in ((129, 70, 17, BF16), (64, 64, 64, F16), (33, 5, 1, F32)):
            base, tuned = pair(make, m, n, dtype=dtype)
            yield OPS.project_delta(make(2, m, r), base, tuned, precision)
            yield OPS.project_delta(make(m, r), None, tuned, precision)


def projection_sums(make: Make) -> Iterator[Tensor]:
    for precision in ("fp32", "bf16x3"):
        base, tuned = pair(make, 129, 70)
        yield from OPS.projection_stats(make(2, 129, 17), make(2, 17, 70), base, tuned, precision)


def covariances(make: Make) -> Iterator[Tensor]:
    for dtype in (BF16, F16, F32, F64):
        for precision in ("float32", "float64"):
            x = make(2, 77, 133, dtype=dtype)
            mask = torch.arange(77, device=x.device).expand(2, 77) % 3 != 1
            for small, side in ((False, 133), (True, 77)):
                cov = torch.zeros(2, side, side, dtype=F64, device=x.device)
                OPS.cov_accumulate(cov, x, 0.5, mask, small, precision)
                yield cov.cpu().triu()


def sketches(make: Make) -> Iterator[Tensor]:
    for kind in ("gaussian", "sparse_sign"):
        for dtype in (BF16, F32, F64):
            yield OPS.sketch(make(33, 70, dtype=dtype), 20, kind, 7)


def wide_grams(make: Make) -> Iterator[Tensor]:
    for dtype in (BF16, F32, F64):
        yield OPS.gram64(make(2, 133, 70, dtype=dtype))


def assignments(make: Make) -> Iterator[Tensor]:
    for shape in ((3, 40, 40), (2, 33, 70), (1, 300, 300)):
        columns, _, _, value = OPS.assign(make(*shape), True, None, None)
        yield columns
        yield value[:, 0]


CALLS: dict[str, Callable[[Make], Iterator[Tensor]]] = {
    "delta_merge": merges,
    "delta_kth": kths,
    "delta_histogram": histograms,
    "delta_l1": sums,
    "delta_gram": grams,
    "delta_signs": signs,
    "finite_cast": casts,
    "project_delta": projections,
    "projection_stats": projection_sums,
    "cov_accumulate": covariances,
    "sketch": sketches,
    "gram64": wide_grams,
    "assign": assignments,
}


def run(name: str, device: str) -> Results:
    importlib.import_module(f"pymerge.ops.{name}")
    return [x.cpu() for x in CALLS[name](maker(device))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="where to run (default cuda)")
    parser.add_argument("names", nargs="*", help="operators (default: all)")
    args = parser.parse_args()
    for name in args.names or [name for name in CALLS if name in OPERATORS]:
        print(f"{name}: {len(run(name, args.device))} results", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
