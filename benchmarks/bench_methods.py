"""Every combine and calibrate method on blocks of real shapes: time, entries/s, share of the machine's peak, memory.

    python benchmarks/bench_methods.py --blocks vit_b32,llama_1b [--methods tsv_m,svc] [--reps 3] [--threads 1]

One process a block and method, models in memory, hyperparameters at the defaults of the Python API; a calibrate step
runs after task arithmetic, and its time is that of both. Seconds are medians. Entries are those of one model's block.
Peak: GFLOP of the formulas in spectral_flops.py over CPU seconds and measured sgemm; element-wise methods: bytes read
once and written once over measured copy bandwidth. Memory is growth above the loaded models, the result included.
Methods that need data are left out. vit_b32 is float32, T = 8; llama_1b and llama_7b are bfloat16, T = 4.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from side_by_side import tools
from side_by_side.checkpoints import Entry
from spectral_flops import spectral_flops
from structured import llama_layers, vit_blocks, write_models
from workers import Failed, Worker

from pymerge import methods
from pymerge.methods.base import Combine, Method

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "bench_methods.json"
REQUIRED_VALUES = {"slerp": {"t": 0.5}}  # hyperparameters without a default
BASE_OF_CALIBRATE = "task_arithmetic"


@dataclass(frozen=True, kw_only=True)
class Block:
    """The tensors of one transformer block and how many fine-tuned models are merged."""

    entries: list[Entry]
    tasks: int
    dtype: str

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for _, shape in self.entries)


BLOCKS = {
    "vit_b32": Block(entries=vit_blocks(1), tasks=8, dtype="F32"),
    "llama_1b": Block(entries=list(llama_layers(1, hidden=2048, kv=512, mlp=8192)), tasks=4, dtype="BF16"),
    "llama_7b": Block(entries=list(llama_layers(1, hidden=4096, kv=4096, mlp=11008)), tasks=4, dtype="BF16"),
}


def arguments() -> argparse.Namespace:
    listed = (*methods.list("combine"), *methods.list("calibrate"))
    known = [name for name in listed if not methods.get(name).needs and name != "passthrough"]  # that copies
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(known))
    parser.add_argument("--blocks", default="vit_b32,llama_1b", help=f"of {', '.join(BLOCKS)}; llama_7b takes long")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a merge is given up")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "bench_methods", help="models")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.methods, args.blocks = args.methods.split(","), args.blocks.split(",")
    for given, names in ((args.methods, known), (args.blocks, list(BLOCKS))):
        if unknown := [name for name in given if name not in names]:
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(names)}")
    return args


def request(cls: type[Method], tasks: int) -> dict[str, Any]:
    """What the worker is asked: the method at its defaults, on as many of the models as it takes."""
    parameters = REQUIRED_VALUES.get(cls.name, {})
    if not issubclass(cls, Combine):
        return {"method": BASE_OF_CALIBRATE, "parameters": {"calibrate": {"method": cls.name, **parameters}}}
    most = cls.models[1]
    asked = {"method": cls.name, "parameters": parameters, "base": cls.base_role != "none"}
    return asked | {"tasks": tasks if most is None else min(tasks, most)}


def measure(cls: type[Method], block: Block, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Medians over the repetitions, or {"failed": why}."""
    asked = request(cls, block.tasks)
    log = args.work / f"{folder.name}.{cls.name}.log"
    try:
        with Worker("pymerge", folder, args.threads, log, limit=args.limit) as worker:
            runs = [worker.ask(asked) for _ in range(args.reps)]
    except Failed as failure:
        return {"failed": str(failure)}
    tasks = asked.get("tasks", block.tasks)
    cost = {key: statistics.median(run[key] for run in runs) for key in ("cpu", "wall", "growth")}
    out = {"tasks": tasks, **cost, "entries_per_s": block.numel / cost["cpu"], "runs": runs}
    flops = spectral_flops(cls.name, [shape for _, shape in block.entries], tasks)
    if flops is not None:
        out["gflop"] = flops / 1e9
    elif cls.element_wise:
        inputs = tasks + asked["base"]
        out["bytes"] = block.numel * (2 if block.dtype == "BF16" else 4) * (inputs + 1)
    return out


def share(result: dict[str, Any], peaks: dict[str, float]) -> str:
    """Of the measured peak of one core, as CPU seconds are counted; sets it in the result too."""
    if "gflop" in result:
        result["of_sgemm"] = result["gflop"] / result["cpu"] / peaks["sgemm_gflops"]
        return f"{result['gflop']:8.0f} GFLOP {result['of_sgemm']:6.2f} of sgemm"
    if "bytes" in result:
        result["of_copy"] = result["bytes"] / 1e9 / result["cpu"] / peaks["copy_gb_per_s"]
        return f"{result['bytes'] / 1e9:8.2f} GB    {result['of_copy']:6.2f} of copy"
    return ""


def show(name: str, result: dict[str, Any], peaks: dict[str, float]) -> None:
    if "failed" in result:
        print(f"{name:18s} not measured: {result['failed']}", flush=True)
        return
    time = f"{result['cpu']:9.3f} CPU s {result['wall']:9.3f} s {result['entries_per_s'] / 1e6:8.2f} M entries/s"
    print(f"{name:18s} {time} {result['growth'] / 1e6:+8.0f} MB  {share(result, peaks)}", flush=True)


def main() -> int:
    args = arguments()
    report: dict[str, Any] = {"threads": args.threads, "reps": args.reps, "blocks": {}}
    report |= tools.provenance(REPOSITORY)
    args.work.mkdir(parents=True, exist_ok=True)
    for name in args.blocks:
        block, folder = BLOCKS[name], args.work / name
        write_models(folder, block.entries, block.tasks, block.dtype)
        with Worker("pymerge", folder, args.threads, args.work / f"{name}.log") as worker:
            peaks, report["versions"] = worker.ask({"peaks": True}), worker.versions
        print(f"{name}: {block.numel / 1e6:.1f} M entries, T = {block.tasks}, {block.dtype}; one core: ", end="")
        print(f"{peaks['sgemm_gflops']:.0f} GFLOP/s sgemm, {peaks['copy_gb_per_s']:.1f} GB/s copy", flush=True)
        results = report["blocks"][name] = {"entries": block.numel, "peaks": peaks, "methods": {}}
        for method in args.methods:
            result = results["methods"][method] = measure(methods.get(method), block, folder, args)
            show(method, result, peaks)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
