"""Reading weights from a loopback S3 server and from memory://, beside fsspec's own `cat` of whole files.

    python benchmarks/bench_remote.py [--bytes 200e6] [--rounds 3]      # needs s3fs

Prints one JSON object: GB/s (medians of interleaved rounds) of `cat` file by file, of pymerge's reader in the order of
a merge (tiles of 8 MiB of three models in turn), of whole merges (linear, bytes read a second) from S3 and from the
local disk, and what a merge under --memory takes at its peak.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import fsspec
import numpy as np
from safetensors.numpy import save_file

TILE = 8 << 20
MODELS = ("base", "one", "two")
HERE = Path(__file__).parent


def write_models(folder: Path, nbytes: int) -> None:
    """Three models of two shards each, float16 matrices of 16 MiB."""
    rng = np.random.default_rng(0)
    count = max(2, nbytes // (16 << 20))
    for name in MODELS:
        target = folder / name
        target.mkdir(parents=True)
        (target / "config.json").write_text("{}")
        names = [f"layers.{i}.weight" for i in range(count)]
        files = {n: f"model-{i * 2 // count}.safetensors" for i, n in enumerate(names)}
        for file in sorted(set(files.values())):
            tensors = {n: rng.standard_normal((2048, 4096)).astype(np.float16) for n in names if files[n] == file}
            save_file(tensors, target / file, {"format": "pt"})
        (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@contextmanager
def loopback_s3(folder: Path) -> Iterator[None]:
    with subprocess.Popen(
        [sys.executable, HERE / "loopback_s3.py", folder], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        os.environ |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing")
        try:
            yield
        finally:
            server.terminate()


def cat(root: str) -> int:
    """fsspec's cat of every weight file."""
    system, path = fsspec.core.url_to_fs(root)
    return sum(len(system.cat_file(file)) for file in system.find(path) if file.endswith(".safetensors"))


def read_tiles(root: str) -> int:
    """All tensors of the three models, tile by tile in turn."""
    from pymerge.checkpoint import open_checkpoint
    from pymerge.remote.blocks import BLOCKS

    BLOCKS.plan(256 << 20, len(MODELS))
    view, read = memoryview(bytearray(TILE)), 0
    models = [open_checkpoint(f"{root}/{name}") for name in MODELS]
    for name in models[0].file_order():
        for start in range(0, models[0][name].nbytes, TILE):
            for model in models:
                part = view[: min(TILE, model[name].nbytes - start)]
                model[name].read_into(part, start)
                read += len(part)
    for model in models:
        model.close()
    return read


def merge(root: str, out: Path, memory: str) -> dict[str, Any]:
    """The summary of a linear merge by the command line, in a process of its own."""
    recipe = out.with_suffix(".yaml")
    models = "".join(f"  - {{model: {root}/{name}, parameters: {{weight: 1}}}}\n" for name in MODELS)
    recipe.write_text(f"merge_method: linear\nmodels:\n{models}")
    command = [sys.executable, "-m", "pymerge", "merge", recipe, out, "--memory", memory, "--quiet"]
    subprocess.run(command, check=True)
    summary = json.loads((out / "merge.json").read_text())
    shutil.rmtree(out)
    return summary


def rate(function: Callable[[str], int], root: str) -> float:
    started = time.perf_counter()
    return function(root) / (time.perf_counter() - started) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=float, default=200e6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", default="500MB")
    options = parser.parse_args()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_models(folder / "bucket", int(options.bytes))
        fsspec.filesystem("memory").put(f"{folder / 'bucket'}/", "memory://bucket/", recursive=True)
        with loopback_s3(folder):
            for number in range(options.rounds):
                for root in ("s3://bucket", "memory://bucket"):
                    found.setdefault(f"{root} cat", []).append(rate(cat, root))
                    found.setdefault(f"{root} pymerge", []).append(rate(read_tiles, root))
                for root in ("s3://bucket", str(folder / "bucket")):
                    summary = merge(root, folder / f"out{number}", options.memory)
                    name = "s3://bucket" if "://" in root else "local"
                    found.setdefault(f"{name} merge", []).append(summary["bytes_read"] / summary["seconds"] / 1e9)
                    found.setdefault(f"{name} merge, peak memory", []).append(summary["peak_rss_bytes"] / 1e9)
    print(json.dumps({name: round(median(values), 3) for name, values in found.items()}, indent=1))


if __name__ == "__main__":
    main()
