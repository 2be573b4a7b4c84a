"""How kernels are timed: one thread, CPU seconds, candidates interleaved in one process, the best of several rounds."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from pymerge import _C
from pymerge.ops.delta_rule import DeltaRule
from pymerge.ops.native import delta_params


def best_seconds(candidates: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """CPU seconds of each candidate, the least of `rounds`; every round runs all of them once."""
    best = dict.fromkeys(candidates, float("inf"))
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return best


def models(n: int, tasks: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and its fine-tuned children: random weights, updates a twentieth of their size."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n, generator=generator) * 0.02
    return base.to(dtype), [(base + 0.001 * torch.randn(n, generator=generator)).to(dtype) for _ in range(tasks)]


def address(x: torch.Tensor) -> tuple[int, str]:
    return x.data_ptr(), {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[x.dtype]


def merger(
    rule: DeltaRule, base: torch.Tensor | None, tuned: list[torch.Tensor], out: torch.Tensor | None = None
) -> Callable[[], object]:
    """The merge of host buffers into a buffer that exists, as a merge on disk runs it; base is added where given."""
    target, params = torch.empty_like(tuned[0]) if out is None else out, delta_params(rule)
    head = None if base is None else address(base)
    buffers = [address(t) for t in tuned]

    def run() -> object:
        return _C.delta_merge(head, buffers, head, address(target), target.numel(), 0, params)

    return run


def copy_gb_per_second(nbytes: int = 1 << 28) -> float:
    """Bytes read plus bytes written by a copy between buffers that do not fit the caches."""
    source = torch.randint(256, (nbytes,), dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * nbytes / best_seconds({"copy": lambda: target.copy_(source)})["copy"] / 1e9


def report(name: str, seconds: float, nbytes: int, copy: float, eager: float | None = None) -> None:
    """One line: time, bandwidth, its share of copy bandwidth, and how many times faster than eager PyTorch."""
    rate = nbytes / seconds / 1e9
    line = f"{name:24s} {seconds * 1e3:9.2f} ms {rate:7.2f} GB/s  {rate / copy:5.2f} of copy"
    print(line if eager is None else f"{line}  {eager / seconds:7.1f}x eager ({eager * 1e3:.0f} ms)", flush=True)
