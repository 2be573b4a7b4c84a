"""Does MuDSC align two networks that share nothing but their architecture better than weights or activations alone?

Pairs of scikit-learn digit classifiers from different seeds, each of both trained on all ten digits ("same task") or
on five of them ("halves", drawn anew for each pair), put in one order of units in each way and averaged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import pymerge
from pymerge.demo.align import halves
from pymerge.demo.train import quiet_and_alone

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
HEADS = {"conv": "12", "vit": "classifier"}


def run(folder: Path, seeds: Sequence[int], say: Callable[[str], None]) -> dict[str, Any]:
    """Train PAIRS pairs a seed of each kind of network and tasks, merge them in each way, evaluate on test images.

    folder   keeps the models: they are trained once
    Returns  settings, and `cells`: of each kind and tasks the pairs; each with `own` (accuracy of the models on what
             they know), `alpha` chosen for each mode, and of each way `joint`, accuracy over all ten digits, and
             `each`, the mean over both tasks of the accuracy among the task's digits. What it says: pairs_report
    Cost     for each seed 3 minutes of one processor for training, 3 for the rest"""
    folder.mkdir(parents=True, exist_ok=True)
    schedules = {kind: asdict(schedule) for kind, schedule in halves.SCHEDULES.items()}
    cells = []
    with quiet_and_alone():
        for kind, title in halves.TITLES.items():
            for tasks in TASKS:
                pairs = []
                for number in (PAIRS * seed + n for seed in seeds for n in range(PAIRS)):
                    pairs.append({"number": number} | compare(kind, *pair(kind, tasks, number, folder)))
                    found = ", ".join(f"{way} {of['joint']:.1%}" for way, of in pairs[-1]["ways"].items())
                    say(f"{title}, {tasks}, pair {number}: {found}")
                cells.append({"kind": title, "tasks": tasks, "pairs": pairs})
    settings = {"seeds": list(seeds), "pairs": PAIRS, "alphas": ALPHAS, "schedules": schedules}
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
    """The mean of both models with their units aligned, by what they do on all of the images as in the authors' code;
    by the weights alone where alpha is 1."""
    batches = halves.digits().images[images].split(200) if alpha < 1 else None
    groups = halves.spec(kind, models[0], tie_heads=mode == "permute")
    units = pymerge.find_permutations(models, batches, spec=groups, mode=mode, alpha=alpha)
    return pymerge.merge(None, models, method="linear", align=units)


def score(model: nn.Module, known: list[list[int]], images: torch.Tensor) -> dict[str, float]:
    target = halves.digits().digits[images]
    with torch.inference_mode():
        found = halves.logits(model, halves.digits().images[images])
    each = [halves.right(found, target, digits) for digits in known]
    return {"joint": halves.right(found, target, range(halves.CLASSES)), "each": sum(each) / len(each)}
