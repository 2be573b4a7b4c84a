"""Polar factors against torch.linalg.svd and scipy.linalg.polar, gram64 against the float64 product.

python benchmarks/bench_polar.py [--shapes tall,square,...] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # scipy's BLAS; read when it is loaded

import scipy.linalg
import torch
from timing import best_seconds
from torch import Tensor

from pymerge.linalg import polar
from pymerge.ops.gram64 import gram64, gram64_reference


def concatenated(n: int, tasks: int = 8) -> Tensor:
    """Orthonormal bases of correlated subspaces side by side: square and ill-conditioned."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(n, n // tasks, generator=generator)
    parts = [torch.linalg.qr(common + torch.randn(n, n // tasks, generator=generator))[0] for _ in range(tasks)]
    return torch.cat(parts, dim=1)


def gaussian(m: int, n: int) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(0))


SHAPES = {
    "tall": lambda: gaussian(4096, 1024),
    "wide": lambda: gaussian(1024, 4096),
    "square768": lambda: concatenated(768),
    "square1024": lambda: concatenated(1024),
    "square2048": lambda: concatenated(2048),
}


def by_svd(x: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def gemm_rate(dtype: torch.dtype, n: int = 1024) -> float:
    """GFLOP/s of torch.matmul, the measured peak to read the others against."""
    a = torch.randn(n, n, dtype=dtype)
    return 2 * n**3 / best_seconds({"matmul": lambda: a @ a})["matmul"] / 1e9


def bench_gram64(rounds: int, peak: float) -> None:
    for m, n in ((4096, 1024), (1024, 1024), (8192, 768)):
        x = gaussian(m, n)
        seconds = best_seconds({"gram64": lambda x=x: gram64(x), "float64": lambda x=x: gram64_reference(x)}, rounds)
        rate = m * n * (n + 1) / seconds["gram64"] / 1e9
        print(
            f"gram64 {m} x {n}: {seconds['gram64'] * 1e3:8.1f} ms {rate:6.1f} GFLOP/s ({rate / peak:.2f} of matmul)  "
            f"{seconds['float64'] / seconds['gram64']:5.2f}x x.double().T @ x.double()",
            flush=True,
        )


def bench_shape(name: str, rounds: int) -> None:
    x = SHAPES[name]()
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    true = u @ vh

    def error(p: Tensor) -> float:
        return float((p.double() - true).norm() / true.norm())

    candidates = {
        "auto": lambda: polar(x).factor,
        "gram": lambda: polar(x, method="gram").factor,
        "qdwh": lambda: polar(x, method="qdwh").factor,
        "torch svd": lambda: by_svd(x),
        "scipy polar": lambda: torch.from_numpy(scipy.linalg.polar(x.numpy())[0]),
    }
    seconds = best_seconds(candidates, rounds)
    print(f"{name} {list(x.shape)}: auto ran {polar(x).methods[0]}, condition {float(torch.linalg.cond(x)):.0f}")
    for label, run in candidates.items():
        ratio = seconds["torch svd"] / seconds[label]
        print(f"  {label:12s} {seconds[label] * 1e3:9.1f} ms {ratio:6.2f}x svd  error {error(run()):.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rate32, rate64 = gemm_rate(torch.float32), gemm_rate(torch.float64)
    print(f"matmul {rate32:.0f} GFLOP/s float32, {rate64:.0f} float64")
    bench_gram64(args.rounds, rate64)
    for name in args.shapes.split(","):
        bench_shape(name, args.rounds)


if __name__ == "__main__":
    main()
