"""Does MuDSC align two networks that share nothing but their architecture better than weights or activations alone?

Pairs of scikit-learn digit classifiers from different seeds, each of both trained on all ten digits ("same task") or
on five of them ("halves", drawn anew for each pair), put in one order of units in each way and averaged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from scipy import stats
from torch import nn

import pymerge
from pymerge.demo.align import halves
from pymerge.demo.train import quiet_and_alone

CLAIM = "MuDSC > single-space for different seeds"
LEVEL = 0.05  # two-sided, of a paired t-test: beyond it is noise
PAIRS = 4  # of each kind of network, for every seed
TASKS = ("same task", "halves")
PAPER = 0.5  # alpha of the authors' code
ALPHAS = (PAPER, 0.25, 0.75, 0.1, 0.9)  # of which one is chosen on held-out images: the best, of equals the first
MODES: dict[Literal["permute", "zip"], str] = {
    "permute": "",
    "zip": "zip, ",
}  # with what the names of their rows begin with
SINGLE = {"weights": {"alpha": 1.0}, "activations": {"alpha": 0.0}}
MUDSC = ("MuDSC", "MuDSC, alpha chosen")
PLAIN = "plain average"
SEEN = 500  # images whose activations are compared
HEADS = {"conv": "12", "vit": "classifier"}


def run(folder: Path, seeds: Sequence[int], say: Callable[[str], None]) -> dict[str, Any]:
    """Train PAIRS pairs a seed of each kind of network and tasks, merge them in each way, evaluate on test images.

    folder   its `pairs` keeps the models: they are trained once
    Returns  settings, and `cells`: of each kind and tasks the pairs; each with `own` (accuracy of the models on what
             they know), `alpha` chosen for each mode, and of each way `joint`, accuracy over all ten digits, and
             `each`, the mean over both tasks of the accuracy among the task's digits. For `summary` and the like
    Cost     for each seed 3 minutes of one processor for training, 2 for the rest"""
    kept = folder / "pairs"
    kept.mkdir(parents=True, exist_ok=True)
    schedules = {kind: asdict(schedule) for kind, schedule in halves.SCHEDULES.items()}
    cells = []
    with quiet_and_alone():
        for kind, title in halves.TITLES.items():
            for tasks in TASKS:
                pairs = []
                for number in (PAIRS * seed + n for seed in seeds for n in range(PAIRS)):
                    pairs.append({"number": number} | compare(kind, *pair(kind, tasks, number, kept)))
                    found = ", ".join(f"{way} {of['joint']:.1%}" for way, of in pairs[-1]["ways"].items())
                    say(f"{title}, {tasks}, pair {number}: {found}")
                cells.append({"kind": title, "tasks": tasks, "pairs": pairs})
    settings = {"seeds": list(seeds), "pairs": PAIRS, "seen": SEEN, "alphas": ALPHAS, "schedules": schedules}
    return json.loads(json.dumps({"settings": settings, "cells": cells}))


def pair(kind: str, tasks: str, number: int, folder: Path) -> tuple[list[nn.Module], list[list[int]]]:
    """Two models and the digits that each knows; of others its head's weights are 0."""
    digits = torch.randperm(halves.CLASSES, generator=torch.Generator().manual_seed(number)).tolist()
    known = [sorted(digits[:5]), sorted(digits[5:])] if tasks == "halves" else [list(range(halves.CLASSES))] * 2
    models = []
    for place, own in enumerate(known):
        schedule = halves.SCHEDULES[kind]
        # As many steps for twice as many images
        epochs = schedule.epochs if tasks == "halves" else max(1, schedule.epochs // 2)
        name = f"{kind}-{tasks.replace(' ', '-')}-{number}-{place}.safetensors"
        model = halves.kept(folder / name, kind, own, replace(schedule, epochs=epochs, seed=2 * number + place))
        unknown = [digit for digit in digits if digit not in own]
        for parameter in model.get_submodule(HEADS[kind]).parameters():
            parameter.data[unknown] = 0
        models.append(model)
    return models, known


def compare(kind: str, models: list[nn.Module], known: list[list[int]]) -> dict[str, Any]:
    train, validation, test = halves.splits()
    ways, chosen = {PLAIN: score(pymerge.merge(None, models, method="linear"), known, test)}, {}
    for mode, prefix in MODES.items():
        for name, options in SINGLE.items():
            ways[prefix + name] = score(merged(kind, models, train, mode=mode, **options), known, test)
        tried = {alpha: merged(kind, models, train, mode=mode, alpha=alpha) for alpha in ALPHAS}
        held_out = {alpha: halves.accuracy(model, validation) for alpha, model in tried.items()}
        chosen[mode] = max(ALPHAS, key=lambda alpha: held_out[alpha])
        for name, alpha in zip(MUDSC, (PAPER, chosen[mode]), strict=True):
            ways[prefix + name] = score(tried[alpha], known, test)
    own = [halves.accuracy(model, test, digits) for model, digits in zip(models, known, strict=True)]
    return {"known": known, "own": own, "alpha": chosen, "ways": ways}


def merged(
    kind: str, models: list[nn.Module], images: torch.Tensor, *, mode: Literal["permute", "zip"], alpha: float
) -> nn.Module:
    """The mean of both models with their units aligned by what they see in the images; by weights alone without."""
    batches = halves.digits().images[images[:SEEN]].split(100) if alpha < 1 else None
    groups = halves.spec(kind, models[0], tie_heads=mode == "permute")
    units = pymerge.find_permutations(models, batches, spec=groups, mode=mode, alpha=alpha)
    return pymerge.merge(None, models, method="linear", align=units)


def score(model: nn.Module, known: list[list[int]], images: torch.Tensor) -> dict[str, float]:
    target = halves.digits().digits[images]
    with torch.inference_mode():
        found = halves.logits(model, halves.digits().images[images])
    each = [halves.right(found, target, digits) for digits in known]
    return {"joint": halves.right(found, target, range(halves.CLASSES)), "each": sum(each) / len(each)}


def title(cell: dict[str, Any]) -> str:
    return f"{cell['kind']}, {cell['tasks']}"


def values(cell: dict[str, Any], way: str, metric: str = "joint") -> list[float]:
    """Percent, one a pair."""
    return [100 * pair["ways"][way][metric] for pair in cell["pairs"]]


def spread(sample: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error. Raises ValueError for fewer than two pairs, which have none."""
    if len(sample) < 2:
        raise ValueError(f"{len(sample)} pairs have no standard error; at least 2 are needed")
    return fmean(sample), stdev(sample) / len(sample) ** 0.5


def opponent(cell: dict[str, Any], prefix: str) -> str:
    """The single space with the higher mean: chosen by the test images, to MuDSC's disadvantage."""
    return max((prefix + name for name in SINGLE), key=lambda way: fmean(values(cell, way)))


def differences(cell: dict[str, Any], prefix: str, way: str) -> list[float]:
    """Points of joint accuracy that a MuDSC is ahead of the better single space, one a pair."""
    single = values(cell, opponent(cell, prefix))
    return [own - other for own, other in zip(values(cell, prefix + way), single, strict=True)]


def judged(sample: Sequence[float]) -> dict[str, Any]:
    """Mean difference in points, standard error, t, two-sided p of a paired t-test, and what that says."""
    mean, error = spread(sample)
    t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    p = 2 * float(stats.t.sf(abs(t), len(sample) - 1))
    says = "within the noise" if p >= LEVEL else "holds" if mean > 0 else "does not hold here"
    return {"points": mean, "error": error, "t": t, "p": p, "pairs": len(sample), "verdict": says}


def verdict(found: dict[str, Any]) -> dict[str, Any]:
    """The claim, for each mode and alpha: in each cell and, under `overall`, for the mean over cells of each number of
    a pair; `text` says the latter in words.

    found    of `pairs.run`, with at least two pairs a cell"""
    rows, overall = [], []
    for mode, prefix in MODES.items():
        for way in MUDSC:
            ahead = {title(cell): differences(cell, prefix, way) for cell in found["cells"]}
            for cell in found["cells"]:
                against = opponent(cell, prefix)
                rows.append({"cell": title(cell), "way": prefix + way, "against": against} | judged(ahead[title(cell)]))
            over_cells = [fmean(sample) for sample in zip(*ahead.values(), strict=True)]
            overall.append({"mode": mode, "way": prefix + way} | judged(over_cells))
    says = (f"{row['way']}: {row['verdict']} ({row['points']:+.1f} ± {row['error']:.1f} points)" for row in overall)
    text = f"against the better single space: {'; '.join(says)}"
    return {"claim": CLAIM, "rows": rows, "overall": overall, "text": text}


def table(found: dict[str, Any]) -> str:
    """Markdown: joint accuracy of each way in each cell, mean and standard error over pairs in percent; then how far
    each MuDSC is ahead of the better single space."""
    cells = found["cells"]
    own = [spread([100 * accuracy for pair in cell["pairs"] for accuracy in pair["own"]]) for cell in cells]
    lines = [line("% of test images", *map(title, cells)), line("---", *["---"] * len(cells))]
    lines.append(line("(each model on what it knows)", *(shown(*of) for of in own)))
    for way in cells[0]["pairs"][0]["ways"]:
        lines.append(line(way, *(shown(*spread(values(cell, way))) for cell in cells)))
    for prefix in MODES.values():
        for way in MUDSC:
            of = [judged(differences(cell, prefix, way)) for cell in cells]
            cost = (f"{row['points']:+.1f} ± {row['error']:.1f}: {row['verdict']}" for row in of)
            lines.append(line(f"{prefix}{way}, less the better single space", *cost))
    return "\n".join(lines) + "\n"


def line(*entries: str) -> str:
    return f"| {' | '.join(entries)} |"


def shown(mean: float, error: float) -> str:
    return f"{mean:.1f} ± {error:.1f}"


def draw(found: dict[str, Any], out: Path) -> Path:
    """A panel a mode: of each cell and MuDSC the difference to the better single space, a point a pair, and its mean
    with the interval that a t-test at LEVEL leaves it."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    cells = found["cells"]
    figure, panels = pyplot.subplots(1, len(MODES), figsize=(10, 4), layout="constrained", sharey=True)
    for axes, (mode, prefix) in zip(panels, MODES.items(), strict=True):
        for number, way in enumerate(MUDSC):
            for place, cell in enumerate(cells):
                ahead, x = differences(cell, prefix, way), place + 0.3 * (number - 0.5)
                mean, error = spread(ahead)
                reach = error * float(stats.t.isf(LEVEL / 2, len(ahead) - 1))
                axes.plot([x] * len(ahead), ahead, f"C{number}.", alpha=0.35)
                label = way if place == 0 else None
                axes.errorbar(x + 0.08, mean, reach, fmt=f"C{number}o", capsize=3, label=label)
        axes.axhline(0, color="k", linewidth=0.8)
        axes.set_xticks(range(len(cells)), [title(cell).replace(", ", "\n") for cell in cells])
        axes.set_title(mode)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("points ahead of the better single space")
    panels[0].legend(frameon=False)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
    return out
