"""What `--accelerate-stock` saves: mergekit's own methods by mergekit, and with pymerge's selection in them.

    python benchmarks/side_by_side/inside_mergekit.py --gb 0.3 --reps 3

Both are `pymerge-mergekit-yaml` on the checkpoints and recipes of against_mergekit.py (a base and three models,
bfloat16), in mergekit's environment, with the native libraries of this source tree; they take turns. CPU seconds,
start-up included. The share of entries that differ is that of equal magnitudes at a border of a selection (della: of
other ranks too).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
from pathlib import Path

import against_mergekit as merge
import tools
from agreement import Weights

METHODS = ("ties", "breadcrumbs", "della")
CODE = "from pymerge.integrations.mergekit_command import main; main()"


def command(python: Path, recipe: Path, out: Path, flags: list[str]) -> list[str]:
    return [str(python), "-c", CODE, str(recipe), str(out), "--no-copy-tokenizer", "--random-seed", "1", *flags]


def share_that_differs(one: Path, other: Path) -> float:
    first, second = Weights(one), Weights(other)
    differ = sum(int((first[name] != second[name]).sum()) for name in first.entries)
    return differ / sum(first[name].size for name in first.entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.3, help="size of one checkpoint")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--work", type=Path, default=merge.REPOSITORY / "build" / "side_by_side")
    parser.add_argument("--mergekit-venv", type=Path, default=merge.REPOSITORY / ".venv-mergekit")
    args = parser.parse_args()
    tools.make_mergekit(args.mergekit_venv)
    os.environ["PYTHONPATH"] = str(merge.REPOSITORY)
    root = merge.checkpoints(args.work, args.gb)
    outs = {name: root / f"inside-{name}" for name in ("stock", "accelerated")}
    for method in args.methods.split(","):
        recipe = tools.write_recipe(root, method, "bfloat16")
        seconds: dict[str, list[float]] = {name: [] for name in outs}
        for _ in range(args.reps):
            for name, out in outs.items():
                flags = ["--accelerate-stock"] if name == "accelerated" else []
                called = command(args.mergekit_venv / "bin" / "python", recipe, out, flags)
                seconds[name].append(tools.run(called, out, args.threads).cpu)
        stock, fast = (statistics.median(seconds[name]) for name in outs)
        differ = share_that_differs(*outs.values())
        print(
            f"{method:12s} {stock:6.1f} -> {fast:5.1f} CPU s, {stock / fast:4.1f} x, {differ:.1e} of the entries differ"
        )
        for out in outs.values():
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
