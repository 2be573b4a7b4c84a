"""The quality suite: families of fine-tuned models, every recipe on each, and what the papers claim of them.

    python -m benchmarks.quality.run [--families vision,language] [--seeds 0,1,2] [--recipes TA,ESM] [--readme]

Models are trained where they are not in --folder yet. What was measured is kept there too: an interrupted run
continues. Writes benchmarks/results/quality.{json,md} and figures.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

import pymerge
from benchmarks.quality import report, trial
from benchmarks.quality.family import Family
from benchmarks.quality.recipes import BY_NAME, RECIPES

REPOSITORY = Path(__file__).resolve().parents[2]


def vision() -> Family:
    from benchmarks.quality.vision import Vision

    return Vision()


def language() -> Family:
    from benchmarks.quality.language import Language

    return Language()


def encoder() -> Family:
    from benchmarks.quality.encoder import Encoder

    return Encoder()


FAMILIES: dict[str, Callable[[], Family]] = {"vision": vision, "language": language, "encoder": encoder}
PAIRS = "pairs"


def single() -> None:
    """In every worker: one thread, so that figures do not depend on the number of processors; no bars of libraries."""
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def prepare(name: str, folder: Path, seeds: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Seeds of a family one after the other: they may share a base."""
    family = FAMILIES[name]()
    return {seed: trial.prepare(family, place(folder, name, seed), seed, say) for seed in seeds}


def place(folder: Path, name: str, seed: int) -> Path:
    return folder / name / f"seed-{seed}"


def measure(name: str, folder: Path, seed: int, recipe: str, models: str) -> dict[str, Any]:
    try:
        return trial.measured(FAMILIES[name](), place(folder, name, seed), BY_NAME[recipe], models)
    except pymerge.MergeError as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def pairs(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    from benchmarks.quality.pairs import run

    return run(folder, list(seeds), say)


class Suite:
    """families, seeds, recipes: names and numbers to run; folder: models and what was measured; workers: processes,
    0: this one."""

    def __init__(
        self, families: Sequence[str], seeds: Sequence[int], recipes: Sequence[str], folder: Path, workers: int
    ) -> None:
        self.families, self.seeds, self.recipes, self.folder = list(families), list(seeds), list(recipes), folder
        self.pool = None
        if workers:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(workers, mp_context=context, initializer=single)

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        if self.pool is not None:
            return self.pool.submit(work, *arguments)
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done

    def run(self) -> dict[str, Any]:
        """What quality.json holds of the runs: {"families": {name: ...}, "pairs": ...}."""
        try:
            merging = [name for name in self.families if name != PAIRS]
            ready = {name: self.submit(prepare, name, self.folder, self.seeds) for name in merging}
            paired = self.submit(pairs, self.folder, self.seeds) if PAIRS in self.families else None
            found = {name: described(name, future.result()) for name, future in ready.items()}
            for name, seed, recipe, row in self.rows(found):
                found[name]["rows"].setdefault(recipe, {})[str(seed)] = row
            for family in found.values():  # in the order of the recipes, whichever was ready first
                family["rows"] = {recipe: family["rows"][recipe] for recipe in self.recipes}
            return {"families": found, PAIRS: paired.result() if paired else None}
        finally:
            if self.pool is not None:
                self.pool.shutdown(cancel_futures=True)

    def rows(self, found: dict[str, Any]) -> Iterator[tuple[str, int, str, dict[str, Any]]]:
        """Every recipe on every family for one seed, then for the next; a line each, with the time left."""
        jobs = {
            self.submit(measure, name, self.folder, seed, recipe, found[name]["seeds"][str(seed)]["models"]): (
                name,
                seed,
                recipe,
            )
            for seed in self.seeds
            for name in found
            for recipe in self.recipes
        }
        start = time.perf_counter()
        for done, future in enumerate(as_completed(jobs), start=1):
            name, seed, recipe = jobs[future]
            row = future.result()
            left = (time.perf_counter() - start) / done * (len(jobs) - done)
            what = (
                row.get("failed")
                or f"{mean(row['default']):.4f}, at scale {row['scale']:.2f}: {mean(row['searched']):.4f}"
            )
            say(f"[{done}/{len(jobs)}, {left / 60:.0f} min left] {name}, seed {seed}, {recipe}: {what}")
            yield name, seed, recipe, row


def mean(scores: dict[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def described(name: str, seeds: dict[int, dict[str, Any]]) -> dict[str, Any]:
    family = FAMILIES[name]()
    return {
        "metric": family.metric,
        "higher_is_better": family.higher_is_better,
        "tasks": list(family.tasks),
        "seeds": {str(seed): scores for seed, scores in seeds.items()},
        "rows": {},
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every, names = [*FAMILIES, PAIRS], [recipe.name for recipe in RECIPES]
    parser.add_argument("--families", default=",".join(every), help="default: %(default)s")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--recipes", default=",".join(names), help="default: all of them")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "quality", help="models and rows")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; 0: only this one")
    parser.add_argument("--readme", action="store_true", help="also rewrite the table in README.md")
    given = parser.parse_args()
    given.families, given.recipes = given.families.split(","), given.recipes.split(",")
    given.seeds = [int(seed) for seed in given.seeds.split(",")]
    unknown = [n for n in given.families if n not in every] + [n for n in given.recipes if n not in names]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; families: {', '.join(every)}; recipes: {', '.join(names)}")
    return given


def main() -> int:
    given = arguments()
    single()
    start = time.perf_counter()
    found = Suite(given.families, given.seeds, given.recipes, given.folder.resolve(), given.workers).run()
    report.write(found, given.results, REPOSITORY / "README.md" if given.readme else None)
    say(f"{(time.perf_counter() - start) / 60:.1f} minutes; {given.results / 'quality.md'}")
    failed = [row for family in found["families"].values() for rows in family["rows"].values() for row in rows.values()]
    return int(any("failed" in row for row in failed))


if __name__ == "__main__":
    raise SystemExit(main())
