"""What earlier runs have left in the suite's folder: FOLDER/FAMILY/seed-N and FOLDER/pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pymerge
from benchmarks.quality import trial
from benchmarks.quality.family import Family
from benchmarks.quality.recipes import BY_NAME

PAIRS = "pairs"  # networks that share no base: no family, but run with them


def place(folder: Path, name: str, seed: int) -> Path:
    return folder / name / f"seed-{seed}"


def family(of: Family, folder: Path, seeds: Sequence[int], recipes: Sequence[str]) -> dict[str, Any]:
    """Of a family: what it is, scores of its individual models and bases, and the rows that fit them."""
    found: dict[str, Any] = {
        "metric": of.metric,
        "higher_is_better": of.higher_is_better,
        "tasks": list(of.tasks),
        "seeds": {},
        "rows": {},
    }
    for seed in seeds:
        here = place(folder, of.name, seed)
        if not (here / trial.INDIVIDUAL).is_file():
            continue
        individual = json.loads((here / trial.INDIVIDUAL).read_text())
        found["seeds"][str(seed)] = individual
        for recipe in recipes:
            if (row := trial.kept(here, BY_NAME[recipe], individual["models"])) is not None:
                found["rows"].setdefault(recipe, {})[str(seed)] = row
    found["rows"] = {recipe: found["rows"][recipe] for recipe in recipes if recipe in found["rows"]}
    return found


def paired(folder: Path, seed: int) -> tuple[Path, list[Any]]:
    """Where the pairs of a seed are kept, and what they depend on."""
    from benchmarks.quality.pairs import ALPHAS
    from benchmarks.quality.pairs import PAIRS as COUNT

    return folder / PAIRS / f"seed-{seed}.json", [trial.VERSION, pymerge.__version__, COUNT, list(ALPHAS)]


def pairs(folder: Path, seeds: Sequence[int]) -> dict[str, Any] | None:
    """As pairs.run gives it for these seeds; None where there is none of them."""
    parts = []
    for seed in seeds:
        file, key = paired(folder, seed)
        if file.is_file() and (part := json.loads(file.read_text()))["key"] == key:
            parts.append(part)
    if not parts:
        return None
    cells = [
        of_seeds[0] | {"pairs": [pair for cell in of_seeds for pair in cell["pairs"]]}
        for of_seeds in zip(*(part["cells"] for part in parts), strict=True)
    ]
    numbers = [number for part in parts for number in part["settings"]["seeds"]]
    return {"settings": parts[0]["settings"] | {"seeds": numbers}, "cells": cells}
