"""A process that merges models in memory on request and says what it cost.

    python benchmarks/method_worker.py pymerge|fusion_bench FOLDER --threads 1

FOLDER holds base, t1, t2, ... as structured.py writes them; all are loaded first. Each line on standard input is a
request {"method", "parameters", "tasks", "save", "inputs"} or {"peaks": true}, each line of standard output the
answer; "inputs": what the models' layers see is loaded and used too (layer_inputs.py). The program's own output is
dropped. Runs in pymerge's environment or in FusionBench's; imports neither at the top.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layer_inputs
import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]
CORNER = 64  # rows and columns of the small merge before the measured one


def load(folder: Path) -> list[State]:
    """The base and the fine-tuned models, in memory of their own: a mapped file would count as growth when read."""
    models = [folder / "base"]
    while (folder / f"t{len(models)}").is_dir():
        models.append(folder / f"t{len(models)}")
    return [{k: v.clone() for k, v in load_file(model / "model.safetensors").items()} for model in models]


def corner(state: State) -> State:
    return {name: t[tuple(slice(CORNER) for _ in t.shape)].clone() for name, t in state.items()}


def as_module(state: State) -> torch.nn.Module:
    """Nested modules that hold the tensors under their names."""
    root = torch.nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
    return root


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measured(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The result; wall and CPU seconds and by how many bytes memory grew above what was held before, at most."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still held would hide growth
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
    before = memory("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    cost = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    peak = memory("VmHWM")
    return result, cost | {"growth": peak - before, "rss": peak}


def pymerge_call(
    models: list[State], inputs: list[State], request: dict[str, Any], threads: int
) -> Callable[[], State]:
    import pymerge

    options = pymerge.Options(threads=threads, progress=False)
    base = models[0] if request.get("base", True) else None
    values = request["parameters"]
    if inputs:
        values = values | {"statistics": [layer_inputs.statistics(grams) for grams in inputs]}
    return lambda: pymerge.merge(base, models[1:], method=request["method"], options=options, **values)


def fusion_bench_call(
    models: list[State], inputs: list[State], request: dict[str, Any], threads: int
) -> Callable[[], State]:
    """`method` is the name of an algorithm class; it may write into the base, so that one is copied first."""
    if inputs:
        algorithm = layer_inputs.fusion_bench_regmean(inputs, request["parameters"])
    else:
        algorithm = fusion_bench_class(request["method"])(**request["parameters"])
    if hasattr(algorithm, "fabric"):
        algorithm.fabric  # noqa: B018  made on first use, not by the merge
    pool = {"_pretrained_": as_module({k: v.clone() for k, v in models[0].items()})}
    pool |= {f"t{t}": as_module(state) for t, state in enumerate(models[1:], 1)}
    from fusion_bench import BaseModelPool

    return lambda: dict(algorithm.run(BaseModelPool(pool)).state_dict())


def fusion_bench_class(name: str) -> Any:
    import fusion_bench.method as methods
    from fusion_bench.method import singular_value_calibration  # its classes are not among fusion_bench.method's names

    return getattr(singular_value_calibration, name, None) or getattr(methods, name)


SIDES = {"pymerge": pymerge_call, "fusion_bench": fusion_bench_call}


def run(side: str, folder: Path, models: list[State], request: dict[str, Any], threads: int) -> dict[str, float]:
    """A merge of the corners first, for what is loaded or made on first use."""
    count = request.get("tasks")
    models = models if count is None else models[: 1 + count]
    inputs = layer_inputs.load(folder, len(models) - 1) if request.get("inputs") else []
    SIDES[side]([corner(state) for state in models], [corner(grams) for grams in inputs], request, threads)()
    merged, cost = measured(SIDES[side](models, inputs, request, threads))
    if request.get("save"):
        save_file({name: t.detach().contiguous() for name, t in merged.items()}, request["save"])
    return cost


def peaks() -> dict[str, float]:
    """What one core of the machine does: float32 products, and copies (bytes read plus bytes written)."""
    from timing import best_seconds, copy_gb_per_second

    x = torch.randn(2048, 2048)
    seconds = best_seconds({"sgemm": lambda: x @ x})["sgemm"]
    return {"sgemm_gflops": 2 * 2048**3 / seconds / 1e9, "copy_gb_per_s": copy_gb_per_second()}


def versions(side: str) -> dict[str, str]:
    packages = ("torch", "numpy") + (("fusion_bench",) if side == "fusion_bench" else ())
    found = {name: importlib.metadata.version(name) for name in packages}
    if side == "pymerge":
        import pymerge

        found["pymerge"] = pymerge.__version__
    return {"python": platform.python_version(), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(args.threads)
    models = load(args.folder)
    print(json.dumps(versions(args.side)), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = peaks() if "peaks" in request else run(args.side, args.folder, models, request, args.threads)
        except Exception as error:  # the caller decides whether that is the end
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
