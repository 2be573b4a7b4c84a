"""The quality suite: families of fine-tuned models, every recipe on each, and what the papers claim of them.

    python -m benchmarks.quality.run [--families vision,language] [--seeds 0,1,2] [--recipes TA,ESM] [--readme]

Models are trained where they are not in --folder yet. What was measured is kept there too: an interrupted run
continues. Writes benchmarks/results/quality.{json,md} and figures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import pymerge
from benchmarks.quality import kept, report, trial
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
    return {seed: trial.prepare(family, kept.place(folder, name, seed), seed, say) for seed in seeds}


def measure(name: str, folder: Path, seed: int, recipe: str, models: str) -> dict[str, Any]:
    try:
        return trial.measured(FAMILIES[name](), kept.place(folder, name, seed), BY_NAME[recipe], models)
    except pymerge.MergeError as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def pairs(folder: Path, seed: int) -> None:
    from benchmarks.quality.pairs import run

    file, key = kept.paired(folder, seed)
    if not file.is_file() or json.loads(file.read_text())["key"] != key:
        file.write_text(json.dumps({"key": key} | run(file.parent, [seed], say)))


class Suite:
    """families, seeds, recipes: names and numbers to run; folder: models and what was measured; workers: processes,
    0: this
    one."""

    def __init__(
        self, families: Sequence[str], seeds: Sequence[int], recipes: Sequence[str], folder: Path, workers: int
    ) -> None:
        self.families, self.seeds, self.recipes, self.folder = list(families), list(seeds), list(recipes), folder
        self.merged = [name for name in families if name != kept.PAIRS]
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
        """Measures what is not there yet. Returns what quality.json holds of it, as `found`."""
        try:
            ready = {name: self.submit(prepare, name, self.folder, self.seeds) for name in self.merged}
            paired = [self.submit(pairs, self.folder, seed) for seed in self.seeds if kept.PAIRS in self.families]
            rows = list(self.rows({name: future.result() for name, future in ready.items()}))
            for future in paired:
                future.result()
        finally:
            if self.pool is not None:
                self.pool.shutdown(cancel_futures=True)
        found = self.found()
        for name, seed, recipe, row in rows:
            if "failed" in row:
                found["families"][name]["rows"].setdefault(recipe, {})[str(seed)] = row
        return found

    def found(self) -> dict[str, Any]:
        """What is there: {"families": {name: see kept.family}, "pairs": see kept.pairs}."""
        of = {name: kept.family(FAMILIES[name](), self.folder, self.seeds, self.recipes) for name in self.merged}
        return {"families": of, "pairs": kept.pairs(self.folder, self.seeds) if kept.PAIRS in self.families else None}

    def rows(self, ready: dict[str, dict[int, dict[str, Any]]]) -> Iterator[tuple[str, int, str, dict[str, Any]]]:
        """Every recipe on every family for one seed, then for the next; a line each, with the time left."""
        jobs = {
            self.submit(measure, name, self.folder, seed, recipe, seeds[seed]["models"]): (name, seed, recipe)
            for seed in self.seeds
            for name, seeds in ready.items()
            for recipe in self.recipes
        }
        start = time.perf_counter()
        for done, future in enumerate(as_completed(jobs), start=1):
            name, seed, recipe = jobs[future]
            row = future.result()
            left = (time.perf_counter() - start) / done * (len(jobs) - done) / 60
            say(f"[{done}/{len(jobs)}, {left:.0f} min left] {name}, seed {seed}, {recipe}: {said(row)}")
            yield name, seed, recipe, row


def said(row: dict[str, Any]) -> str:
    default, searched = (fmean(row.get(how, {"": 0.0}).values()) for how in ("default", "searched"))
    return row.get("failed") or f"{default:.4f}, at scale {row['scale']:.2f}: {searched:.4f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every, names = [*FAMILIES, kept.PAIRS], [recipe.name for recipe in RECIPES]
    parser.add_argument("--families", default=",".join(every), help="default: %(default)s")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--recipes", default=",".join(names), help="default: all of them")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "quality", help="models and rows")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; 0: only this one")
    parser.add_argument("--kept", action="store_true", help="measure nothing: report what is in --folder")
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
    suite = Suite(
        given.families, given.seeds, given.recipes, given.folder.resolve(), 0 if given.kept else given.workers
    )
    found = suite.found() if given.kept else suite.run()
    report.write(found, given.results, REPOSITORY / "README.md" if given.readme else None)
    say(f"{(time.perf_counter() - start) / 60:.1f} minutes; {given.results / 'quality.md'}")
    failed = [row for family in found["families"].values() for rows in family["rows"].values() for row in rows.values()]
    return int(any("failed" in row for row in failed))


if __name__ == "__main__":
    raise SystemExit(main())
