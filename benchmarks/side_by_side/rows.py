"""The rows of the speed suite: what each comparison script writes and run.py puts together. Imports nothing large.

A script saves its rows to the file that --json names; run.py reads them all, adds machine, commit and date, and makes
the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

REPOSITORY = Path(__file__).resolve().parents[2]
TIE = 0.97  # a ratio down to this is no loss: what medians of a few runs on a shared machine vary by


@dataclass(frozen=True, kw_only=True)
class Runs:
    """One program in one comparison.

    wall, cpu      seconds of each repetition; cpu is user + system, children included
    rss            bytes, peak resident memory of the process (largest of the repetitions)
    growth         bytes that the peak is above what was held before the work, inputs in memory; None: whole processes
    read, written  bytes from and to storage in one repetition that starts with inputs out of the page cache; None where
                   nothing is on disk
    """

    wall: list[float]
    cpu: list[float]
    rss: int
    growth: int | None = None
    read: int | None = None
    written: int | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method in one setting, by pymerge and by everyone else who has it; all took turns in one run.

    peer           the comparison that the row belongs to: mergekit, fusion_bench, sd_mecha, peft, pytorch, assignment
    method         what is computed, in pymerge's words
    setting        sizes, dtype, number of models, threads: what a reader needs to repeat it
    measure        the seconds that ratios are of; wall where programs may use several threads or the disk
    opponents      by name and version
    floors         by name: what no program can be faster than (copy of the bytes, products at GEMM speed); no ratio
    difference     largest over the opponents, relative, of the merged update (or as `compared` says); None: random
    agrees         whether the results agree within the bound of the comparison
    compared       in a few words, what was compared and to which bound
    cause          why pymerge is slower than the strongest opponent; "" where it is not
    note           what else a reader must know, e.g. extrapolated from how many steps
    """

    peer: str
    method: str
    setting: str
    measure: Literal["wall", "cpu"]
    pymerge: Runs
    opponents: dict[str, Runs]
    floors: dict[str, Runs] = field(default_factory=dict)
    difference: float | None = None
    agrees: bool
    compared: str
    cause: str = ""
    note: str = ""

    def seconds(self, runs: Runs) -> float:
        """The median that ratios are made of."""
        return statistics.median(getattr(runs, self.measure))

    def strongest(self) -> tuple[str, Runs]:
        """The opponent of the least time; there is at least one."""
        return min(self.opponents.items(), key=lambda item: self.seconds(item[1]))

    def ratio(self) -> float:
        """The strongest opponent's time over pymerge's: above 1 pymerge is the faster one."""
        return self.seconds(self.strongest()[1]) / self.seconds(self.pymerge)

    def slower(self) -> bool:
        return self.ratio() < TIE


def arguments(doc: str | None, name: str) -> argparse.ArgumentParser:
    """The options that every comparison script has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=REPOSITORY / "build" / "speed" / f"{name}.json", help="the rows")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repetition: shows that all of it works")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    return parser


def pin(threads: int) -> None:
    """This process and its children to as many processors: the last ones, as the first serve most interrupts."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


def save(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([as_json(row) for row in rows], indent=1) + "\n")


def as_json(row: Row) -> dict[str, Any]:
    """Seconds with five digits: a short turn has hundreds of repetitions."""
    entry = asdict(row)
    for runs in (entry["pymerge"], *entry["opponents"].values(), *entry["floors"].values()):
        for key in ("wall", "cpu"):
            runs[key] = [float(f"{value:.5g}") for value in runs[key]]
    return entry


def load(path: Path) -> list[Row]:
    return [from_json(entry) for entry in json.loads(path.read_text())]


def from_json(entry: dict[str, Any]) -> Row:
    values = dict(entry, pymerge=Runs(**entry["pymerge"]))
    for key in ("opponents", "floors"):
        values[key] = {name: Runs(**runs) for name, runs in entry[key].items()}
    return Row(**values)
