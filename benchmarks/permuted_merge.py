"""What it costs to read a model in another order: a linear merge of two models, plain and with `align:`.

    python benchmarks/permuted_merge.py [--layers 8] [--reps 7] [--work DIR]

Two Llama-shaped checkpoints of 1 GB in bfloat16 (8 layers), read from the page cache; every group of the second moves.
Plain and permuted runs alternate in one process: wall and CPU seconds of each, medians of their ratios.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from statistics import median

import torch
from side_by_side.checkpoints import model_config, tensors
from structured import write_models

import pymerge
from pymerge.align.random_permutations import random_permutations
from pymerge.align.specs import spec_for

CONFIG = model_config(1.0) | {"hidden_size": 2048, "intermediate_size": 5632, "head_dim": 128}
CONFIG |= {"num_attention_heads": 16, "num_key_value_heads": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--work", type=Path, default=Path(__file__).resolve().parents[1] / "build" / "permuted_merge")
    args = parser.parse_args()
    config = CONFIG | {"num_hidden_layers": args.layers}
    shapes = dict(tensors(config))
    write_models(args.work, list(shapes.items()), 1, "BF16", config)
    models = [args.work / "base", args.work / "t1"]
    permutations = random_permutations(
        spec_for(shapes, config), tuple(map(str, models)), torch.Generator().manual_seed(0)
    )
    permutations.check()

    def run(**align: object) -> tuple[float, float]:
        out = args.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        wall, cpu = time.perf_counter(), time.process_time()
        pymerge.merge(None, models, method="linear", out=out, **align)
        return time.perf_counter() - wall, time.process_time() - cpu

    run(align=permutations)
    found = [(run(), run(align=permutations)) for _ in range(args.reps)]
    for label, i in (("wall", 0), ("CPU", 1)):
        plain, permuted = median(p[i] for p, _ in found), median(q[i] for _, q in found)
        ratio = median(q[i] / p[i] for p, q in found)
        print(f"{label:4s} s  plain {plain:.2f}  permuted {permuted:.2f}  ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
