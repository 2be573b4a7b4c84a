"""pymerge and sd-mecha on the same safetensors files: time, memory, bytes, agreement of results.

    python benchmarks/side_by_side/against_sd_mecha.py --gb 0.3 --reps 3 --threads 2

sd-mecha 1.1.8, in an environment of its own, on the Llama-shaped checkpoints of the comparison with mergekit, each
method that both have with the same formula; whole programs, start-up included, inputs in the page cache. Results are
compared at float32 on small models without equal magnitudes, whose fine-tuned tensors have the length of the base's:
sd-mecha's SLERP gives its result the interpolated length, pymerge's the ends' own, and there both are one formula. What
sd-mecha has beyond that has no counterpart with the same formula (geometric median, rotations, rank truncation).
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import peer_tools
import rows
import tools
from against_mergekit import checkpoints
from rows import REPOSITORY, Row, Runs

HERE = Path(__file__).resolve().parent
OURS, THEIRS = "pymerge", "sd-mecha 1.1.8"
FLOOR = "copy of the output to disk"
TIES = "{density: 0.25, scope: tensor, scale: 1.0}"
DARE = "{density: 0.5, trim: 1.0, merge_func: mean, scope: tensor, scale: 1.0}"
METHODS: dict[str, tuple[tuple[str, ...], str]] = {  # models beside the base, hyperparameters
    "linear": (("m1", "m2", "m3"), "{weight: 1.0}"),
    "task_arithmetic": (("m1", "m2", "m3"), "{scale: 0.4}"),
    "slerp": (("m1",), "{t: 0.4}"),
    "ties": (("m1", "m2", "m3"), TIES),
    "dare_ties": (("m1", "m2", "m3"), DARE),
    "model_stock": (("m1", "m2"), "{filter_wise: true}"),
}
RANDOM = ("dare_ties",)
SHAPES = {"wide": (256, 768), "tall": (768, 256), "square": (512, 512), "norm": (512,)}  # of results that are compared
BOUND = 1e-4  # of the merged update: float32 norms and products of weights twenty times as large


def arguments() -> Namespace:
    parser = rows.arguments(__doc__, "sd_mecha")
    parser.add_argument("--gb", type=float, default=0.3, help="size of one checkpoint")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "side_by_side", help="checkpoints, outputs")
    args = parser.parse_args()
    args.methods = args.methods.split(",")
    if unknown := [name for name in args.methods if name not in METHODS]:
        parser.error(f"unknown: {', '.join(unknown)}; methods: {', '.join(METHODS)}")
    if args.quick:
        args.gb, args.reps = 0.02, 1
    return args


def inputs(method: str, root: Path) -> list[Path]:
    models = [root / name for name in METHODS[method][0]]
    return models if method == "linear" else [root / "base", *models]


def write_recipe(method: str, root: Path, dtype: str) -> Path:
    models, values = METHODS[method]
    lines = [
        f"merge_method: {method}",
        f"dtype: {dtype}",
        "style: authors",
        "seed: 0",
        f"parameters: {values}",
        "models:",
    ]
    lines += [f"  - model: {root / name}" for name in models]
    if method != "linear":
        lines.append(f"base_model: {root / 'base'}")
    path = root / f"sd_mecha.{method}.{dtype}.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def commands(method: str, root: Path, out: Path, dtype: str, threads: int) -> dict[str, list[str]]:
    python, worker = peer_tools.PEERS / "bin" / "python", HERE / "sd_mecha_worker.py"
    return {
        OURS: tools.pymerge_command(write_recipe(method, root, dtype), out, threads),
        THEIRS: [str(python), str(worker), method, str(root), str(out), dtype, str(threads)],
    }


def write_small(root: Path) -> None:
    """base, m1, m2, m3: float32, each tensor of every model of one length."""
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    base = {name: np.float32(0.02) * rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
    for model in ("base", "m1", "m2", "m3"):
        tensors = dict(base)
        for name, x in base.items() if model != "base" else ():
            child = x + np.float32(1e-3) * rng.standard_normal(x.shape, np.float32)
            tensors[name] = child * (np.linalg.norm(x) / np.linalg.norm(child))
        (root / model).mkdir(parents=True, exist_ok=True)
        save_file(tensors, root / model / "model.safetensors")


def agreement(method: str, root: Path, threads: int) -> dict[str, Any]:
    """What a row says of it: difference, agrees, compared."""
    import numpy as np
    from agreement import SIGMAS, Weights, compare_random

    outs = {name: root / name for name in ("ours", "theirs")}
    for out, program in zip(outs.values(), (OURS, THEIRS), strict=True):
        tools.run(commands(method, root, out, "float32", threads)[program], out, threads)
    base, ours, theirs = (Weights(folder) for folder in (root / "base", *outs.values()))
    if method in RANDOM:
        worst = max(compare_random(base[name], ours[name], theirs[name])["of_bound"] for name in SHAPES)
        compared = f"share and size of what changed, within {SIGMAS:g} standard deviations"
        return {"difference": None, "agrees": worst <= 1.0, "compared": compared}
    apart = max(
        float(np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(theirs[name] - base[name])) for name in SHAPES
    )
    return {"difference": apart, "agrees": apart <= BOUND, "compared": f"merged update in float32, to {BOUND:g}"}


def main() -> int:
    args = arguments()
    peer_tools.make_peers()
    rows.pin(args.threads)
    root, out = checkpoints(args.work, args.gb), args.work / "sd_mecha_out"
    measured: dict[str, dict[str, Runs]] = {}
    for method in args.methods:
        programs = commands(method, root, out, "bfloat16", args.threads)
        floors = {FLOOR: tools.synced_copy_command(root / "base", out)}
        reps = dict.fromkeys((*programs, *floors), args.reps)
        measured[method] = peer_tools.programs_in_turns(programs, floors, inputs(method, root), out, reps, args.threads)
        seconds = ", ".join(f"{name} {min(found.wall):.2f} s" for name, found in measured[method].items())
        print(f"{method:16s} {seconds}", flush=True)
    small = args.work / "sd_mecha_small"
    write_small(small)
    found = []
    for method, runs in measured.items():
        found.append(
            Row(
                peer="sd_mecha",
                method=method,
                setting=f"{args.gb:g} GB a model, {len(inputs(method, root))} models, bfloat16, {args.threads} threads",
                measure="wall",
                pymerge=runs[OURS],
                opponents={THEIRS: runs[THEIRS]},
                floors={FLOOR: runs[FLOOR]},
                **agreement(method, small, args.threads),
            )
        )
    rows.save(args.json, found)
    peer_tools.show(found)
    return 0 if all(row.agrees for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
