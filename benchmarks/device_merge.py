"""Whole merges from disk to disk on a device: seconds, agreement with the CPU, peak device memory against the plan.

    python benchmarks/device_merge.py --out device_merge.json [--device cuda] [--shape small] [--seconds 400]

Shapes (device_models.py makes the models, in a temporary folder: set TMPDIR to a disk with room):
  small  0.6 GB, three fine-tuned models; also with `auto`, and with so little device memory that tensors are cut
  1b     Llama-3.2-1B, 2.5 GB, four;  7b  Llama-2-7B, 13.5 GB, two, element-wise;  7b_4_layers  of it, for matrices
  tiny   to try the script

Element-wise merges must give the CPU's bytes; of spectral ones the distance of the updates is reported,
||d - d_cpu|| / ||d_cpu||, where the CPU is quick enough. `plain` is the same formula in plain PyTorch, one tensor after
the other: read to the device, merged in float32, written by safetensors. Merges of tiny models come first and are not
timed: they start the device's libraries. Times begin with inputs in the page cache, as far as memory holds them, and
end with the output on disk. No merge begins after --seconds.

Exit code 1: a merge failed, bytes differ, or a device took more memory than its plan said.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_cuda import eager_dare, eager_linear, eager_ties
from device_models import Config, llama, make, parameters
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import pymerge

TIGHT = 600_000_000  # of device memory: the vocabulary matrices are merged in tiles
SCALE = 0.9  # of the plain formulations
ELEMENT_WISE = ("task_arithmetic", "ties", "dare_linear")
SPECTRAL: dict[str, dict[str, Any]] = {
    "tsv_m": {"method": "tsv_m"},
    "tsv_m + svc": {"method": "tsv_m", "calibrate": "svc"},
    "ace": {"method": "ace"},
}
PLAIN: dict[str, Callable[[Tensor, list[Tensor]], Tensor]] = {
    "task_arithmetic": eager_linear,
    "ties": eager_ties,
    "dare_linear": eager_dare,
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """reference: merges that the CPU does, too; thorough: also `auto` and TIGHT."""

    config: Config
    tasks: int
    merges: tuple[str, ...]
    reference: tuple[str, ...] = ELEMENT_WISE
    thorough: bool = False


ONE_B = llama(2048, 8192, 16, heads=32, kv_heads=8, vocabulary=128256, tied=True)
SEVEN_B = llama(4096, 11008, 32, heads=32, kv_heads=32, vocabulary=32000, tied=False)
SHAPES = {
    "tiny": Shape(
        config=llama(64, 96, 2, heads=4, kv_heads=2, vocabulary=128, tied=False),
        tasks=2,
        merges=(*ELEMENT_WISE, *SPECTRAL),
        reference=(*ELEMENT_WISE, *SPECTRAL),
        thorough=True,
    ),
    "small": Shape(
        config=llama(1536, 4096, 7, heads=12, kv_heads=12, vocabulary=32000, tied=False),
        tasks=3,
        merges=("task_arithmetic", "ties", "tsv_m"),
        reference=("task_arithmetic", "ties", "tsv_m"),
        thorough=True,
    ),
    "1b": Shape(config=ONE_B, tasks=4, merges=(*ELEMENT_WISE, *SPECTRAL), reference=(*ELEMENT_WISE, "tsv_m")),
    "7b": Shape(config=SEVEN_B, tasks=2, merges=ELEMENT_WISE),
    "7b_4_layers": Shape(config=SEVEN_B | {"num_hidden_layers": 4}, tasks=2, merges=tuple(SPECTRAL), reference=()),
}


def settings(name: str, tasks: int) -> dict[str, Any]:
    """What the plain formulations compute: a mean of task vectors, an elected one, one of a third of the entries."""
    return {
        "task_arithmetic": {"method": "task_arithmetic", "scale": SCALE / tasks},
        "ties": {"method": "ties", "scope": "tensor", "density": 0.2, "scale": SCALE},
        "dare_linear": {"method": "dare_linear", "density": 0.3, "scale": SCALE / tasks},
        **SPECTRAL,
    }[name]


def models(root: Path, tasks: int) -> list[Path]:
    return [root / f"m{t}" for t in range(1, tasks + 1)]


def merged(root: Path, shape: Shape, name: str, device: str, memory: int | None = None) -> dict[str, Any]:
    """One merge into root/out: what is reported of it."""
    shutil.rmtree(root / "out", ignore_errors=True)
    options = pymerge.Options(device=device, device_memory=memory, progress=False)
    begin = time.perf_counter()
    summary = pymerge.merge(
        root / "base", models(root, shape.tasks), out=root / "out", options=options, **settings(name, shape.tasks)
    )
    seconds = time.perf_counter() - begin
    devices = summary.get("devices", [])
    return {
        "merge": name,
        "by": "pymerge",
        "device": device,
        "device_memory": memory,
        "seconds": round(seconds, 2),
        "read_gb_per_s": round(summary["bytes_read"] / seconds / 1e9, 2),
        "devices": devices,
        "peak_device_bytes": max((row["taken_bytes"] for row in devices), default=0),
        "kept_to_the_plan": all(row["taken_bytes"] <= row["peak_bytes"] for row in devices),
    }


def plain(root: Path, shape: Shape, name: str, device: str) -> dict[str, Any]:
    """The same in plain PyTorch, into root/out."""
    shutil.rmtree(root / "out", ignore_errors=True)
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin, result = time.perf_counter(), {}
    base, *tuned = (
        safe_open(path / "model.safetensors", "pt", device) for path in (root / "base", *models(root, shape.tasks))
    )
    for key in base.keys():
        result[key] = PLAIN[name](base.get_tensor(key), [file.get_tensor(key) for file in tuned]).cpu()
    (root / "out").mkdir()
    save_file(result, root / "out" / "model.safetensors")
    with open(root / "out" / "model.safetensors", "rb") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
    return {
        "merge": name,
        "by": "plain PyTorch",
        "device": device,
        "seconds": round(seconds, 2),
        "peak_device_bytes": peak,
    }


def result_of(root: Path) -> dict[str, Tensor]:
    """The output in memory of its own: the file is about to be deleted."""
    return {name: x.clone() for name, x in load_file(root / "out" / "model.safetensors").items()}


def distance(root: Path, expected: dict[str, Tensor], device: str) -> float:
    """Of the update in root/out from another one's."""
    apart = size = 0.0
    with (
        safe_open(root / "out" / "model.safetensors", "pt", device) as found,
        safe_open(root / "base" / "model.safetensors", "pt", device) as base,
    ):
        for name, other in expected.items():
            other = other.to(device).double()
            apart += float((found.get_tensor(name).double() - other).square().sum())
            size += float((other - base.get_tensor(name).double()).square().sum())
    return (apart / size) ** 0.5


def compared(root: Path, shape: Shape, name: str, device: str) -> Iterator[dict[str, Any]]:
    """The rows of one merge; `distance` is from the CPU's update, or, of plain ones, from pymerge's."""
    expected, cpu_seconds = None, None
    if name in shape.reference:
        cpu_seconds = merged(root, shape, name, "cpu")["seconds"]
        expected = result_of(root)
    for where, memory in ((device, None), ("auto", None), (device, TIGHT)):
        extra = where != device or memory is not None
        if extra and (not shape.thorough or (memory is not None and (name in SPECTRAL or device == "cpu"))):
            continue
        row = merged(root, shape, name, where, memory) | {"cpu_seconds": cpu_seconds}
        row["distance"] = None if expected is None else distance(root, expected, device)
        row["right"] = row["kept_to_the_plan"] and (name in SPECTRAL or row["distance"] == 0)
        yield row
    if name in PLAIN:
        ours = expected or result_of(root)
        row = plain(root, shape, name, device)
        yield row | {"distance": None if name == "dare_linear" else distance(root, ours, device)}


def merges(root: Path, shape: Shape, device: str, until: float) -> Iterator[dict[str, Any]]:
    """Rows of all merges; one that fails does not keep the others from being measured."""
    warm = root / "warm"
    make(warm, SHAPES["tiny"].config, shape.tasks, device)
    for name in shape.merges:
        with suppress(Exception):  # the merge itself says what is wrong
            merged(warm, shape, name, device)
    for name in shape.merges:
        if time.monotonic() > until:
            yield {"merge": name, "error": "left out: no time"}
            continue
        try:
            yield from compared(root, shape, name, device)
        except Exception as error:
            yield {"merge": name, "error": f"{type(error).__name__}: {error}"[:300], "right": False}


def fitting(shape: Shape, root: Path) -> Shape:
    """With fewer layers where the disk has no room for all models and an output."""
    needed = 2 * parameters(shape.config) * (shape.tasks + 2)
    free = shutil.disk_usage(root).free - 1e9
    if needed <= free:
        return shape
    layers = shape.config["num_hidden_layers"]
    without = 2 * parameters(shape.config | {"num_hidden_layers": 0}) * (shape.tasks + 2)
    fit = int((free - without) / ((needed - without) / layers))
    if fit < 1:
        raise SystemExit(f"{root}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free (TMPDIR chooses)")
    return replace(shape, config=shape.config | {"num_hidden_layers": fit})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--seconds", type=float, default=400.0, help="begin no merge after so long")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        shape = fitting(SHAPES[args.shape], root)
        begin = time.perf_counter()
        make(root, shape.config, shape.tasks, args.device)
        os.sync()  # or a merge would wait for the disk to take the models
        report = {
            "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device,
            "devices": torch.cuda.device_count(),
            "torch": torch.__version__,
            "shape": args.shape,
            "layers": shape.config["num_hidden_layers"],
            "model_bytes": 2 * parameters(shape.config),
            "tasks": shape.tasks,
            "seconds_to_make": round(time.perf_counter() - begin, 1),
            "merges": rows,
        }
        for row in merges(root, shape, args.device, until):
            rows.append(row)
            print(json.dumps(row), flush=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")  # what is measured outlives a time limit
    return 0 if all(row.get("right", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
