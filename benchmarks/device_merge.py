"""Whole merges from disk to disk on a device: seconds, agreement with the CPU, peak device memory against the plan.

    python benchmarks/device_merge.py --out device_merge.json [--device cuda] [--gb 0.6] [--root DIR]

A base and three fine-tuned LLaMA-shaped models of `--gb` GB each (side_by_side/checkpoints.py). Element-wise merges
must give the CPU's bytes; of spectral ones the distance of the updates is reported, ||d - d_cpu|| / ||d_cpu||. The
first merge on a device is not timed: it starts the device's libraries.

Exit code 1: bytes differ, or a device took more memory than its plan said.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from side_by_side.checkpoints import make

import pymerge

TIGHT = 600_000_000  # of device memory: the vocabulary matrices are merged in tiles
SETTINGS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"method": "task_arithmetic", "scale": 0.4},
    "ties": {"method": "ties", "scope": "tensor", "density": 0.2},
    "tsv_m": {"method": "tsv_m"},
}
SPECTRAL = ("tsv_m",)


def merged(root: Path, name: str, device: str, memory: int | None = None) -> dict[str, Any]:
    """One merge into root/out: what is reported of it."""
    options = pymerge.Options(device=device, device_memory=memory, overwrite=True, progress=False)
    begin = time.perf_counter()
    models = [root / f"m{i}" for i in (1, 2, 3)]
    summary = pymerge.merge(root / "base", models, out=root / "out", options=options, **SETTINGS[name])
    seconds = time.perf_counter() - begin
    devices = summary.get("devices", [])
    return {
        "merge": name,
        "device": device,
        "seconds": round(seconds, 2),
        "read_gb_per_s": round(summary["bytes_read"] / seconds / 1e9, 2),
        "devices": devices,
        "kept_to_the_plan": all(row["taken_bytes"] <= row["peak_bytes"] for row in devices),
    }


def distance(root: Path, expected: dict[str, torch.Tensor]) -> float:
    """Of the update from that of the CPU."""
    found, base = load_file(root / "out" / "model.safetensors"), load_file(root / "base" / "model.safetensors")
    apart = sum(float((found[n].double() - expected[n].double()).square().sum()) for n in base)
    size = sum(float((expected[n].double() - base[n].double()).square().sum()) for n in base)
    return (apart / size) ** 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gb", type=float, default=0.6)
    parser.add_argument("--root", type=Path, help="where the models are kept; default: a temporary folder")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = args.root or Path(temporary)
        make(root, args.gb, models=3, shard_gb=1000.0)
        merged(root, "task_arithmetic", args.device)
        for name in SETTINGS:
            cpu_seconds = merged(root, name, "cpu")["seconds"]
            expected = load_file(root / "out" / "model.safetensors")
            for device, memory in ((args.device, None), ("auto", None), (args.device, TIGHT)):
                if memory is not None and (name in SPECTRAL or args.device == "cpu"):
                    continue
                row = merged(root, name, device, memory) | {"cpu_seconds": cpu_seconds}
                rows.append(row)
                row["device_memory"] = memory
                row["distance"] = distance(root, expected)
                row["right"] = row["kept_to_the_plan"] and (name in SPECTRAL or row["distance"] == 0)
                print(json.dumps(row), flush=True)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    report = {"device": name, "devices": torch.cuda.device_count(), "torch": torch.__version__, "merges": rows}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
