"""One recipe on one family and seed: merged from disk to disk, scored at its own scale and at the best of a grid."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import pymerge
from benchmarks.quality.family import Family, Split
from benchmarks.quality.recipes import Recipe
from pymerge.runtime import emr, esmpp
from pymerge.runtime.routing import Experts

VERSION = 1  # raise it when what is kept would come out otherwise
GRID = tuple(2 ** (n / 2) for n in range(-6, 9))  # 1/8 to 16, in steps of sqrt(2)

INDIVIDUAL = "individual.json"

Scores = dict[str, float]  # task -> the family's metric


def prepare(family: Family, folder: Path, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains and observes what is not there; scores of the individual models and of the base.

    Returns  {"models": digest of all weights, "individual" and "base": {split: scores}}, kept in folder/individual.json
    """
    family.train(folder, seed, say)
    files = [folder / "base", *(folder / "tasks" / task for task in family.tasks)]
    digest = hashlib.blake2b(str(VERSION).encode(), digest_size=16)
    for file in sorted(weights for checkpoint in files for weights in checkpoint.glob("*.safetensors")):
        digest.update(file.read_bytes())
    file = folder / INDIVIDUAL
    if file.is_file() and (found := json.loads(file.read_text()))["models"] == digest.hexdigest():
        return found
    shutil.rmtree(folder / "statistics", ignore_errors=True)
    (folder / "statistics").mkdir()
    found = {"models": digest.hexdigest(), "individual": {}, "base": {}}
    base, splits = family.load(folder / "base"), get_args(Split)
    found["base"] = {split: {t: family.score(base, t, folder, split) for t in family.tasks} for split in splits}
    found["individual"] = {split: {} for split in splits}
    for task in family.tasks:
        pymerge.observe(folder / "tasks" / task, family.samples(folder, task)).save(statistics(folder, task))
        own = family.load(folder / "tasks" / task)
        for split in splits:
            found["individual"][split][task] = family.score(own, task, folder, split)
    file.write_text(json.dumps(found))
    return found


def statistics(folder: Path, task: str) -> Path:
    return folder / "statistics" / f"{task}.safetensors"


def measured(family: Family, folder: Path, recipe: Recipe, models: str) -> dict[str, Any]:
    """The row of a recipe; from disk where the same was measured before (models: the digest of prepare).

    Returns  seconds of the merge; "default" and "searched": scores on the test split, at scale 1 and at "scale", the
             best of those that were "tried" on the validation split"""
    if (row := kept(folder, recipe, models)) is not None:
        return row
    merged = folder / "merged" / slug(recipe)
    shutil.rmtree(merged, ignore_errors=True)
    start = time.perf_counter()
    merge(family, folder, recipe, merged)
    seconds = time.perf_counter() - start
    network = Merged(family, folder, recipe, merged)
    scale, tried = best_scale(lambda s: network.mean(s, "validation"), family.higher_is_better)
    default = network.scores(1.0, "test")
    searched = default if scale == 1.0 else network.scores(scale, "test")
    row = {"key": key_of(recipe, models), "seconds": seconds, "default": default}
    row |= {"scale": scale, "tried": tried, "searched": searched}
    shutil.rmtree(merged)
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / f"{slug(recipe)}.json").write_text(json.dumps(row))
    return row


def kept(folder: Path, recipe: Recipe, models: str) -> dict[str, Any] | None:
    """The row of a recipe, if it was measured on these models (a digest) before."""
    file = folder / "results" / f"{slug(recipe)}.json"
    row = json.loads(file.read_text()) if file.is_file() else {}
    return row if row.get("key") == key_of(recipe, models) else None


def key_of(recipe: Recipe, models: str) -> str:
    made_of = [VERSION, pymerge.__version__, models, asdict(recipe), GRID]
    return hashlib.blake2b(json.dumps(made_of).encode(), digest_size=16).hexdigest()


def slug(recipe: Recipe) -> str:
    return recipe.name.lower().replace(" ", "").replace("++", "pp")


def merge(family: Family, folder: Path, recipe: Recipe, out: Path) -> None:
    """pymerge, disk to disk, on one thread; heads stay out."""
    models = [folder / "tasks" / task for task in family.tasks]
    base = None if pymerge.methods.describe(recipe.method).base == "none" else folder / "base"
    given: dict[str, Any] = {"exclude": family.heads} if family.heads else {}
    if recipe.observed == "statistics":
        given["statistics"] = [statistics(folder, task) for task in family.tasks]
    elif recipe.observed == "data":
        given["data"] = [joined(family.samples(folder, task)) for task in family.tasks]
    options = pymerge.Options(overwrite=True, progress=False, threads=1)
    pymerge.merge(base, models, method=recipe.method, out=out, options=options, **given, **recipe.parameters)


def joined(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def best_scale(score: Callable[[float], float], higher_is_better: bool) -> tuple[float, dict[str, float]]:
    """Walks over GRID from 1 to where neither neighbour is better; (scale, {scale: score of all that were tried})."""
    sign, tried = 1 if higher_is_better else -1, {}

    def at(place: int) -> float:
        if not 0 <= place < len(GRID):
            return -float("inf")
        if place not in tried:
            tried[place] = score(GRID[place])
        return sign * tried[place]

    place = GRID.index(1.0)
    step = 1 if at(place + 1) > at(place) else -1
    while at(place + step) > at(place):
        place += step
    return GRID[place], {f"{GRID[n]:.3f}": value for n, value in sorted(tried.items())}


class Merged:
    """base + s (merged - base), and for each task what the method keeps beside the model, scaled alike."""

    def __init__(self, family: Family, folder: Path, recipe: Recipe, merged: Path) -> None:
        self.family, self.folder = family, folder
        self.network = family.load(merged)
        start = dict(family.load(folder / "base").named_parameters())
        self.merged = [name for name in start if not any(fnmatchcase(name, head) for head in family.heads)]
        self.parameters = [(p, start[name].detach()) for name, p in self.of(self.network)]
        self.ends: dict[str, list[Tensor]] = {}  # of each task, or, by "", of all
        self.experts: list[tuple[Tensor, Tensor]] = []
        if recipe.per_task == "masks":
            for task in family.tasks:
                self.ends[task] = self.masked(merged, task)
        else:
            self.ends[""] = [p.detach().clone() for p, _ in self.parameters]
        if recipe.per_task == "experts":
            esmpp.attach(self.network, merged)
            found = [module.left for module in self.network.modules() if isinstance(module, Experts)]
            self.experts = [(left, left.clone()) for left in found]

    def masked(self, merged: Path, task: str) -> list[Tensor]:
        """Parameters of a task's model, through a checkpoint: it may name them otherwise than the network does."""
        own = merged / "of-task"
        own.mkdir(exist_ok=True)
        shutil.copy(merged / "config.json", own)
        weights = emr.load(merged, self.folder / "base", str(self.folder / "tasks" / task))
        save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
        return [p.detach() for _, p in self.of(self.family.load(own))]

    def of(self, network: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """What was merged: all but the heads, which have as many classes as one task or another."""
        parameters = dict(network.named_parameters())
        return [(name, parameters[name]) for name in self.merged]

    def scores(self, scale: float, split: Split) -> Scores:
        """ESM++'s experts take part: s times what the merged model and the experts add to the base."""
        for left, whole in self.experts:
            left.copy_(scale * whole)
        if "" in self.ends:
            self.rescale("", scale)
        found = {}
        for task in self.family.tasks:
            if task in self.ends:
                self.rescale(task, scale)
            found[task] = self.family.score(self.network, task, self.folder, split)
        return found

    def rescale(self, which: str, scale: float) -> None:
        with torch.no_grad():
            for (parameter, start), end in zip(self.parameters, self.ends[which], strict=True):
                parameter.copy_(torch.lerp(start, end, scale))

    def mean(self, scale: float, split: Split) -> float:
        scores = self.scores(scale, split)
        return sum(scores.values()) / len(scores)
