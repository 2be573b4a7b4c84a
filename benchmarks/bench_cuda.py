"""The operators on a CUDA device against a copy and the eager forms.  python benchmarks/bench_cuda.py --out cuda.json

GB/s counts the bytes that must move (each input once, each output once); `of_copy`: by those of a copy in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pymerge.ops import implementations

ROWS, COLUMNS = 4096, 14336  # an MLP matrix of an 8B model: 117 MB of bfloat16, more than any L2 cache
OPS = torch.ops.pymerge
NO_CUTS = {"row_length": 0, "top_theta": None, "top_index": None, "skip_theta": None, "skip_index": None}
PLAIN = {"scale": 0.9, "divisor": 1.0, "rescales": None, "elect": False, "tie_sign": 1, "norm": "none"}
NO_MASK = {"keep": None, "keys": None}


def milliseconds(run: Callable[[], object], seconds: float = 0.5) -> float:
    """Median time on the device, after a warm-up."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times, begin = [], time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin < seconds and len(times) < 50):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def merge(base: Tensor, tuned: list[Tensor], **changes: object) -> tuple[Tensor, Tensor]:
    args = {**PLAIN, **NO_CUTS, **NO_MASK, "weights": [1 / len(tuned)] * len(tuned), "out_dtype": base.dtype, **changes}
    return OPS.delta_merge(base, tuned, base, **args)


def eager_linear(base: Tensor, tuned: list[Tensor]) -> Tensor:
    total = sum((x.float() - base.float()) / len(tuned) for x in tuned)
    return (base.float() + 0.9 * total).to(base.dtype)


def dare(base: Tensor, tuned: list[Tensor]) -> Tensor:
    count = len(tuned)
    return merge(base, tuned, keep=[0.3] * count, keys=list(range(count)), rescales=[1 / 0.3] * count)[0]


def eager_dare(base: Tensor, tuned: list[Tensor]) -> Tensor:
    total = torch.zeros_like(base, dtype=torch.float32)
    for x in tuned:
        d = x.float() - base.float()
        total += torch.bernoulli(torch.full_like(d, 0.3)) * d / 0.3 / len(tuned)
    return (base.float() + 0.9 * total).to(base.dtype)


def ties(base: Tensor, tuned: list[Tensor]) -> Tensor:
    theta, index = OPS.delta_kth(base, tuned, [base.numel() // 5] * len(tuned), 0, None, None)
    ones = [1.0] * len(tuned)
    return merge(base, tuned, weights=ones, top_theta=theta, top_index=index, elect=True, norm="count")[0]


def eager_ties(base: Tensor, tuned: list[Tensor]) -> Tensor:
    kept = []
    for x in tuned:
        d = x.float() - base.float()
        size = d.abs()
        theta = size.view(-1).kthvalue(d.numel() - d.numel() // 5 + 1).values
        kept.append(torch.where(size >= theta, d, 0))
    stacked = torch.stack(kept)
    sign = torch.sign(stacked.sum(0))
    sign = torch.where(sign == 0, torch.sign(sign.sum()), sign)  # as released: no sign, the sign of most
    part = torch.where(torch.sign(stacked) == sign, stacked, 0)
    total = part.sum(0) / (part != 0).sum(0).clamp(min=1)
    return (base.float() + 0.9 * total).to(base.dtype)


def eager_cast(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.to(torch.bfloat16)
    return y, (~torch.isfinite(y)).sum()


def measure(report: list[dict], name: str, gigabytes: float, run: Callable, eager: Callable | None = None) -> None:
    ours = milliseconds(run)
    row = {"name": name, "ms": round(ours, 4), "gb_per_s": round(gigabytes / ours * 1e3, 1)}
    copy = report[0]["gb_per_s"] if report else row["gb_per_s"]
    row["of_copy"] = round(row["gb_per_s"] / copy, 3)
    if eager is not None:
        row["eager_ms"] = round(milliseconds(eager), 4)
        row["speedup"] = round(row["eager_ms"] / ours, 2)
    report.append(row)
    print(f"{name:28s} {row['ms']:9.3f} ms {row['gb_per_s']:8.1f} GB/s {row['of_copy']:6.2f} of copy", end="")
    print(f" {row['speedup']:8.1f} x eager" if eager is not None else "", flush=True)


def benchmarks() -> list[dict]:
    g = torch.Generator(device="cuda").manual_seed(0)
    base32 = torch.randn(ROWS, COLUMNS, device="cuda", generator=g) * 0.02
    noise = [torch.randn(ROWS, COLUMNS, device="cuda", generator=g) * 0.001 for _ in range(8)]
    base, tuned = base32.bfloat16(), [(base32 + x).bfloat16() for x in noise]
    size, out = base.numel() * 2 / 1e9, torch.empty_like(base)
    del noise
    report: list[dict] = []
    measure(report, "copy", 2 * size, lambda: out.copy_(base))
    for count in (2, 3, 8):
        some = tuned[:count]
        moved = (count + 2) * size
        measure(report, f"linear T={count}", moved, lambda s=some: merge(base, s), lambda s=some: eager_linear(base, s))
    three, moved = tuned[:3], 5 * size
    measure(report, "dare T=3", moved, lambda: dare(base, three), lambda: eager_dare(base, three))
    measure(report, "ties T=3", moved, lambda: ties(base, three), lambda: eager_ties(base, three))
    measure(report, "elected merge T=3", moved, lambda: merge(base, three, elect=True, norm="count"))
    ranks, none = [base.numel() // 5] * 3, (None, None)
    measure(report, "delta_kth T=3, one row", 4 * size, lambda: OPS.delta_kth(base, three, ranks, 0, *none))
    rows = [COLUMNS // 5] * 3
    measure(report, "delta_kth T=3, rows", 4 * size, lambda: OPS.delta_kth(base, three, rows, COLUMNS, *none))
    measure(report, "delta_histogram T=3", 4 * size, lambda: OPS.delta_histogram(base, three, *none, None))
    measure(report, "delta_l1 T=3", 4 * size, lambda: OPS.delta_l1(base, three, **NO_MASK, **NO_CUTS))
    measure(report, "delta_gram T=2", 2 * size, lambda: OPS.delta_gram(None, three[:2]))
    signs = {"weights": [1.0] * 3, "rescales": None, **NO_MASK, **NO_CUTS}
    measure(report, "delta_signs T=3", 4 * size, lambda: OPS.delta_signs(base, three, **signs))
    cast = lambda: OPS.finite_cast(base32, torch.bfloat16)  # noqa: E731
    measure(report, "finite_cast", 3 * size, cast, lambda: eager_cast(base32))
    wide = [x.float() for x in three[:2]]
    measure(report, "linear T=2, float32", 8 * size, lambda: merge(base32, wide), lambda: eager_linear(base32, wide))
    return report


def tests_of(path: Path | None) -> dict[str, int] | None:
    """Counts of a JUnit report; None where there is none."""
    if path is None or not path.exists():
        return None
    suites = list(xml.etree.ElementTree.parse(path).getroot().iter("testsuite"))
    return {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--tests", type=Path, help="JUnit report of the device tests, to be summarised in the JSON")
    parser.add_argument("--build-seconds", type=int, help="what the build took, for the JSON")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result: dict = {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "commit": commit or None,
        "build_seconds": args.build_seconds,
        "tests": tests_of(args.tests),
    }
    for name, runs in implementations().items():
        if runs["cuda"] == "reference":
            print(f"bench_cuda: {name} has no native CUDA kernel, the PyTorch reference is timed", file=sys.stderr)
    try:
        result["benchmarks"] = benchmarks()
    except Exception as error:
        result["benchmark_error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
