"""pymerge and mergekit on the same YAML files, side by side: time, peak memory, bytes, agreement of results.

    python benchmarks/side_by_side/against_mergekit.py --gb 0.3 --reps 3 --threads 2

Makes LLaMA-shaped bf16 checkpoints (a base and three fine-tuned ones), then runs each method that both have, start-up
included and with the inputs in the page cache: pymerge, mergekit 0.1.5 in an environment of its own, and as floors
pymerge's reader and writer with no arithmetic, and a copy of the output's bytes to disk. pymerge and the floors end
with the bytes on disk; mergekit leaves them to the page cache. A run of both with the inputs out of the page cache
comes first: its bytes are reported, its time is not. Afterwards both run at dtype float32 on a smaller size and the
results are compared (agreement.py).
"""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import peer_tools
import rows
import tools
from rows import REPOSITORY, Row, Runs

HERE = Path(__file__).resolve().parent
WORK = REPOSITORY / "build" / "side_by_side"
QUICK = ("slerp", "ties", "dare_linear")
OURS, THEIRS = "pymerge", "mergekit 0.1.5"
FLOORS = ("reading and writing alone", "copy of the output to disk")
COMPARED = "merged update in float32"


def arguments() -> Namespace:
    parser = rows.arguments(__doc__, "mergekit")
    parser.add_argument("--gb", type=float, default=0.3, help="size of one checkpoint")
    parser.add_argument("--methods", default=",".join(tools.METHODS))
    parser.add_argument("--large-gb", type=float, default=1.2, help="size for --large-methods; 0: none")
    parser.add_argument("--large-methods", default="slerp,ties")
    parser.add_argument("--mergekit-reps", type=int, default=2, help="at the large size: 1")
    parser.add_argument("--agree-gb", type=float, default=0.06, help="size for the comparison of results")
    parser.add_argument("--work", type=Path, default=WORK, help="checkpoints and outputs")
    parser.add_argument("--mergekit-venv", type=Path, default=REPOSITORY / ".venv-mergekit")
    args = parser.parse_args()
    args.methods, args.large_methods = (names.split(",") for names in (args.methods, args.large_methods))
    if unknown := [name for name in args.methods + args.large_methods if name not in tools.METHODS]:
        parser.error(f"unknown: {', '.join(unknown)}; methods: {', '.join(tools.METHODS)}")
    if args.quick:
        args.gb, args.large_gb, args.agree_gb, args.reps, args.mergekit_reps = 0.02, 0.0, 0.02, 1, 1
        args.methods = [name for name in args.methods if name in QUICK]
    args.large_methods = [name for name in args.large_methods if name in args.methods and args.large_gb]
    return args


def checkpoints(work: Path, gb: float) -> Path:
    """In a process of its own: what this one holds would be the floor of every child's peak RSS."""
    root = work.resolve() / f"{gb:g}"
    script = [sys.executable, str(HERE / "checkpoints.py"), str(root), "--gb", str(gb)]
    subprocess.run([*script, "--models", str(len(tools.TASKS)), "--shard-gb", "5"], check=True)
    return root


def command(program: str, args: Namespace, recipe: Path, root: Path, out: Path) -> list[str]:
    match program:
        case "pymerge":
            return tools.pymerge_command(recipe, out, args.threads)
        case "mergekit 0.1.5":
            return tools.mergekit_command(args.mergekit_venv, recipe, out)
        case "reading and writing alone":
            return tools.floor_command(recipe, out, args.threads)
        case _:
            return tools.synced_copy_command(root / "base", out)


def measure(method: str, args: Namespace, root: Path, mergekit_reps: int) -> dict[str, Runs]:
    """Costs of each program."""
    out = root / "out"
    recipe = tools.write_recipe(root, method, "bfloat16")
    commands, floors = (
        {name: command(name, args, recipe, root, out) for name in names} for names in ((OURS, THEIRS), FLOORS)
    )
    folders = [root / name for name in tools.recipe_models(method)]
    reps = dict.fromkeys((*commands, *floors), args.reps) | {THEIRS: mergekit_reps}
    return peer_tools.programs_in_turns(commands, floors, folders, out, reps, args.threads)


def row(method: str, setting: str, runs: dict[str, Runs], agreement: dict, agree_gb: float) -> Row:
    compared, count = f"{COMPARED}, {agree_gb:g} GB", len(tools.recipe_models(method))
    if method in tools.RANDOM:
        compared = f"share and size of what changed, within six standard deviations, {agree_gb:g} GB"
    elif "mergekit_error" in agreement:
        compared += f", against the formula in float64 (mergekit: {agreement['mergekit_error']:.0e})"
    if agreement.get("excepted"):
        compared += f"; {agreement['excepted']} entries of equal magnitude at a cut are left out"
    return Row(
        peer="mergekit",
        method=method,
        setting=setting,
        measure="wall",
        pymerge=runs[OURS],
        opponents={THEIRS: runs[THEIRS]},
        floors={name: runs[name] for name in FLOORS},
        difference=agreement.get("error"),
        agrees=agreement["agrees"],
        compared=compared,
        note=f"{count} model{'s' * (count > 1)}" if count <= len(tools.TASKS) else "",
    )


def main() -> int:
    args = arguments()
    tools.make_mergekit(args.mergekit_venv)
    rows.pin(args.threads)
    # Its libraries come from storage once: these bytes are none of a merge's.
    subprocess.run([args.mergekit_venv / "bin" / "mergekit-yaml", "--help"], check=True, stdout=subprocess.DEVNULL)
    measured: list[tuple[str, str, dict[str, Runs]]] = []  # method, setting, costs
    sizes = [(args.gb, args.methods, args.mergekit_reps), (args.large_gb, args.large_methods, 1)]
    for gb, methods, mergekit_reps in sizes:
        root = checkpoints(args.work, gb) if methods else Path()
        for method in methods:
            runs = measure(method, args, root, mergekit_reps)
            setting = f"{gb:g} GB a model, bfloat16, {args.threads} thread{'s' * (args.threads > 1)}"
            measured.append((method, setting, runs))
            seconds = ", ".join(f"{name} {min(found.wall):.2f} s" for name, found in runs.items())
            print(f"{method:16s} {gb:g} GB: {seconds}", flush=True)
    from agreement import compare_methods  # numpy is loaded only after the timed runs

    small = checkpoints(args.work, args.agree_gb)
    agreement = compare_methods(small, args.methods, args.mergekit_venv, args.threads)
    rows.save(args.json, [row(*each, agreement[each[0]], args.agree_gb) for each in measured])
    return 0 if all(result["agrees"] for result in agreement.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
