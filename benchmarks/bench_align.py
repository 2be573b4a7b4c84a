"""Permutations of ViT layers and of a Llama-3-8B layer: one whole search and its steps, against dense permutation
matrices.  python benchmarks/bench_align.py

search: 2-layer ViT, activation start and one sweep, against dense_alignment.py (the released schedule); both from the
same activation similarities, both with (q, k) and v in groups of their own. steps: gathering rows of a weight against
multiplying by a permutation matrix, inner products of two models against the stacked ones, assignment against scipy
(and lap or lapx, whichever is importable). One thread, CPU seconds. Writes benchmarks/results/align.json; runs with the
other package add its times to it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import torch
from bench_assign import lap_functions, matrix
from dense_alignment import DenseSolver
from scipy.optimize import linear_sum_assignment
from side_by_side.tools import provenance
from timing import best_seconds
from torch import Tensor

from pymerge.align import Entry, Spec, Units
from pymerge.align.random_permutations import random_permutations
from pymerge.align.solve import Solver
from pymerge.align.sweeps import Options
from pymerge.align.weights import WeightSimilarity
from pymerge.checkpoint import open_checkpoint
from pymerge.linalg import assign

REPOSITORY = Path(__file__).resolve().parent.parent
OUT = REPOSITORY / "benchmarks" / "results" / "align.json"
WIDTHS = {"ViT-S": (384, 6, 1536), "ViT-B": (768, 12, 3072)}  # residual stream, heads, MLP
LLAMA = (4096, 14336)
COLUMNS = 1024  # of the Llama layer's weights in a product; the time of the whole is that many times more
ITEMS = {"ViT-S": (384, 1536), "ViT-B": (768, 3072), "Llama-3-8B": LLAMA}


def vit(width: int, heads: int, mlp: int, layers: int) -> tuple[Spec, dict[str, tuple[int, ...]]]:
    """A ViT with fused q, k, v in the released groups."""
    shapes: dict[str, tuple[int, ...]] = {"cls": (1, 1, width), "pos": (1, 197, width), "patch": (width, 768)}
    residual = [Entry(parameter=name, axis=axis, role="out") for name, axis in (("cls", 2), ("pos", 2), ("patch", 0))]
    groups = []

    def linear(name: str, into: int, out: int) -> None:
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def rows(name: str, part: tuple[int, int] = (0, 1)) -> list[Entry]:
        return [Entry(parameter=f"{name}.{kind}", axis=0, role="out", part=part) for kind in ("weight", "bias")]

    def columns(name: str) -> Entry:
        return Entry(parameter=f"{name}.weight", axis=1, role="in")

    for at in range(layers):
        for norm in ("norm1", "norm2"):
            shapes |= {f"{at}.{norm}.{kind}": (width,) for kind in ("weight", "bias")}
            residual += rows(f"{at}.{norm}")
        linear(f"{at}.qkv", width, 3 * width)
        linear(f"{at}.proj", width, width)
        linear(f"{at}.fc1", width, mlp)
        linear(f"{at}.fc2", mlp, width)
        residual += [columns(f"{at}.qkv"), *rows(f"{at}.proj"), columns(f"{at}.fc1"), *rows(f"{at}.fc2")]
        qk = (*rows(f"{at}.qkv", (0, 3)), *rows(f"{at}.qkv", (1, 3)))
        groups.append(Units(name=f"{at}.qk", size=width, blocks=heads, entries=qk))
        values = (*rows(f"{at}.qkv", (2, 3)), columns(f"{at}.proj"))
        groups.append(Units(name=f"{at}.v", size=width, blocks=heads, entries=values))
        groups.append(Units(name=f"{at}.mlp", size=mlp, entries=(*rows(f"{at}.fc1"), columns(f"{at}.fc2"))))
    return Spec(groups=(Units(name="residual", size=width, entries=tuple(residual)), *groups)), shapes


def problem(
    kind: str, spec: Spec, shapes: dict[str, tuple[int, ...]]
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Two models and the correlations of their units: one is the other in another order with as much noise
    ("planted"), or they have nothing in common ("unrelated")."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    order = random_permutations(spec, ("a", "b"), generator)
    one = {name: draw(shape) * 0.02 for name, shape in shapes.items()}
    other = {name: draw(shape) * 0.02 for name, shape in shapes.items()}
    if kind == "planted":
        other = {name: order.aligned(name, one[name], 1) + other[name] for name in one}
    seen = {}
    for group in spec.groups:
        n = group.views()["units"]
        first, second = draw((n, 2 * n)), draw((n, 2 * n))
        if kind == "planted":
            second = first[order.index[group.name]["units"][1]] + 2 * second
        seen[group.name] = torch.corrcoef(torch.cat([first, second]))
    return [one, other], seen


def searches(kind: str, layers: int = 2) -> dict[str, Callable[[], list[Tensor]]]:
    """Activation start and one sweep over the groups of a ViT-S: the permutations, in the groups' order."""
    spec, shapes = vit(*WIDTHS["ViT-S"], layers=layers)
    states, seen = problem(kind, spec, shapes)

    def ours() -> list[Tensor]:
        activations = {g.name: {"units": seen[g.name][:n, n:]} for g in spec.groups for n in g.views().values()}
        weights = WeightSimilarity(spec, [open_checkpoint(s) for s in states], cosine=False, memory=2_000_000_000)
        solver = Solver(spec, weights, [activations], Options(alpha=0.5, max_sweeps=1))
        placed = solver.run(from_activations=True).state[0]
        return [placed[group.name].index["units"] for group in spec.groups]

    def dense() -> list[Tensor]:
        solver = DenseSolver(spec, states, seen, 0.5)
        placed = solver.run(solver.from_activations(), max_sweeps=1)
        return [placed[group.name][1].argmax(1) for group in spec.groups]

    return {"pymerge": ours, "dense": dense}


def search(kind: str, rounds: int) -> dict[str, Any]:
    candidates = searches(kind)
    seconds = best_seconds(candidates, rounds)
    equal = all(torch.equal(a, b) for a, b in zip(*(run() for run in candidates.values()), strict=True))
    ratio = seconds["dense"] / seconds["pymerge"]
    print(
        f"search {kind:9s} {seconds['pymerge']:6.2f} s, dense {seconds['dense']:6.2f} s, {ratio:.1f}x, equal: {equal}"
    )
    return seconds | {"ratio": ratio, "equal": equal}


def products(n: int, width: int, whole: int, rounds: int) -> dict[str, Any]:
    """One weight [n, width] of two models: its columns in another order, and the inner products of its rows.

    whole  the columns that the layer's weights have in all"""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(n, width, generator=generator) for _ in range(2))
    index = torch.randperm(width, generator=generator)
    candidates: dict[str, Callable[[], object]] = {
        "gather": lambda: other.index_select(1, index),
        "gram": lambda: one @ other.T,
    }
    if n <= 4096:
        matrix_of = torch.eye(width)[index]
        stacked = torch.cat([one, other])
        candidates |= {"permutation matrix": lambda: other @ matrix_of.T, "stacked gram": lambda: stacked @ stacked.T}
    seconds = best_seconds(candidates, rounds)
    times = "  ".join(f"{name} {t * 1e3:.1f} ms" for name, t in seconds.items())
    print(f"  [{n}, {width}] of {whole} columns: {times}", flush=True)
    return {"rows": n, "columns": width, "of": whole, **seconds}


def assignment(kind: str, n: int, rounds: int) -> dict[str, float]:
    score = matrix(kind, n)
    array = score.numpy()
    candidates = {
        "pymerge": lambda: assign(score, True),
        "scipy": lambda: linear_sum_assignment(array, maximize=True),
        **lap_functions(score),
    }
    seconds = best_seconds(candidates, rounds)
    print(f"  {kind} {n}: " + "  ".join(f"{name} {t:.4f} s" for name, t in seconds.items()), flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("search", "products", "assignments"), default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--largest", type=int, default=4096, help="largest assignment")
    parser.add_argument("--kinds", nargs="+", default=["planted", "noise", "identity", "correlated"])
    args = parser.parse_args()
    parts = args.parts or ("search", "products", "assignments")
    torch.set_num_threads(1)
    report: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {}
    report |= provenance(REPOSITORY)
    if "search" in parts:
        report["search"] = {kind: search(kind, args.rounds) for kind in ("planted", "unrelated")}
    if "products" in parts:
        report["products"] = {}
        for name, (width, mlp) in ITEMS.items():
            print(name)
            slab = COLUMNS if name not in WIDTHS else max(width, mlp)
            report["products"][name] = [
                products(width, min(mlp, slab), mlp, args.rounds),  # the residual stream, of one MLP weight
                products(mlp, min(width, slab), width, args.rounds),  # the MLP, of one of its weights
            ]
    if "assignments" in parts:
        package = next(iter(packages_distributions().get("lap", ["neither"])))
        times = report.setdefault("assignments", {})[f"beside {package}"] = {}
        for n in sorted({n for pair in ITEMS.values() for n in pair}):
            for kind in args.kinds if n <= args.largest else ():
                times[f"{kind} {n}"] = assignment(kind, n, args.rounds if n > 1024 else 10 * args.rounds)
    OUT.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
