"""benchmarks/results/gpu.md from what gpu_check.sh left beside it: "not run" for each part without a run on a GPU.

python benchmarks/gpu_table.py [--results DIR]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
HEAD = """# On a GPU

Made by `python benchmarks/gpu_table.py` of what `bash benchmarks/gpu_check.sh --part PART` measured; times of one
device, named in each section. A ratio above 1: pymerge is the faster one.
"""
Lines = Iterator[str]


def table(*names: str) -> Lines:
    yield "| " + " | ".join(names) + " |"
    yield "| " + " | ".join("---" for _ in names) + " |"


def line(*values: object) -> str:
    return "| " + " | ".join("-" if value is None else str(value) for value in values) + " |"


def gigabytes(size: float | None) -> str | None:
    return None if size is None else f"{size / 1e9:.2f} GB"


def ratio(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f} x"


def elementwise(found: dict[str, Any]) -> Lines:
    yield from table("operator", "ms", "GB/s", "of a copy", "eager PyTorch, ms", "ratio")
    for row in found["benchmarks"]:
        plain = row.get("eager_ms")
        yield line(row["name"], row["ms"], row["gb_per_s"], row["of_copy"], plain, ratio(row.get("speedup")))


def dense(found: dict[str, Any]) -> Lines:
    yield from table("operator", "ms", "against", "ms", "ratio")
    for row in found["benchmarks"]:
        if "error" in row:
            yield line(row["name"], row["error"], None, None, None)
            continue
        for name, other in (row["others"] or {"": {}}).items():
            yield line(row["name"], row["ms"], name, other.get("ms", other.get("error")), ratio(other.get("speedup")))


def methods(found: dict[str, Any]) -> Lines:
    yield from table(
        "method", "matrix", "ms", "peak memory", "plain PyTorch", "ms", "peak memory", "ratio", "differ by"
    )
    for row in found["methods"]:
        size = " x ".join(map(str, row["shape"]))
        if "error" in row:
            yield line(row["method"], size, row["error"], *[None] * 6)
            continue
        ours = (row["method"], size, row["ms"], gigabytes(row["peak_bytes"]))
        for name, other in row["others"].items():
            if "error" in other:
                yield line(*ours, name, other["error"], *[None] * 3)
            else:
                apart = f"{other['distance']:.0e}"
                yield line(*ours, name, other["ms"], gigabytes(other["peak_bytes"]), ratio(other["speedup"]), apart)


def merges(found: dict[str, Any]) -> Lines:
    model = f"{found['tasks']} models of {gigabytes(found['model_bytes'])}, {found['layers']} layers, and their base"
    yield f"{model}; `differ by`: pymerge's update from its own on the CPU, plain PyTorch's from pymerge's."
    yield ""
    yield from table("merge", "by", "device", "s", "on the CPU, s", "peak device memory", "differ by")
    for row in found["merges"]:
        if "error" in row:
            yield line(row["merge"], row["error"], *[None] * 5)
            continue
        where = row["device"] + (", tight" if row.get("device_memory") else "")
        apart = None if row["distance"] is None else f"{row['distance']:.0e}"
        cpu, peak = row.get("cpu_seconds"), gigabytes(row["peak_device_bytes"])
        yield line(row["merge"], row["by"], where, row["seconds"], cpu, peak, apart)


SECTIONS: tuple[tuple[str, str, str, Callable[[dict[str, Any]], Lines]], ...] = (
    ("Element-wise operators", "kernels", "cuda.json", elementwise),
    ("Products, decompositions, assignment", "kernels", "cuda_linalg.json", dense),
    ("Merges of 0.6 GB models", "kernels", "device_merge_small.json", merges),
    ("Methods for matrices", "methods", "cuda_methods.json", methods),
    ("Merges of a 1B shape", "1b", "device_merge_1b.json", merges),
    ("Merges of a 7B shape, element-wise", "7b", "device_merge_7b.json", merges),
    ("Merges of a 7B shape with fewer layers, matrices", "7b", "device_merge_7b_4_layers.json", merges),
)


def real(path: Path) -> dict[str, Any] | None:
    """What a run on a GPU left; None: there was none."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found if found.get("device") not in (None, "cpu") and "benchmark_error" not in found else None


def markdown(results: Path) -> str:
    lines = [HEAD]
    for title, part, file, rows in SECTIONS:
        found = real(results / file)
        lines += [f"## {title} (`--part {part}`)", ""]
        if found is None:
            lines += ["not run", ""]
        else:
            lines += [f"{found['device']}, torch {found['torch']}.", "", *rows(found), ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    results = parser.parse_args().results
    (results / "gpu.md").write_text(markdown(results))
    print(results / "gpu.md")


if __name__ == "__main__":
    main()
