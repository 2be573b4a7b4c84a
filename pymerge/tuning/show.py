"""What a person sees of a search: a line a try, and the scores as bars."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from pymerge.tuning.record import FILE, Try

if TYPE_CHECKING:
    from pymerge.tuning.grid import SweepResult
    from pymerge.tuning.run import SearchResult

WIDTH = 40  # of the longest bar
SHOWN = 40  # tries that are plotted in a terminal


def values_text(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in values.items())


class Display:
    """Shows nothing."""

    def evaluating(self, where: str) -> AbstractContextManager[Any]:
        """While a model is evaluated."""
        return nullcontext()

    def continued(self, tries: int) -> None:
        """How many are known from an earlier run."""

    def line(self, text: str) -> None:
        """Says something."""

    def tried(self, one: Try, progress: tuple[int, int], is_best: bool) -> None:
        """After a try. progress: values so far, and in all."""


class Lines(Display):
    """A line a try on standard error; on a terminal a spinner meanwhile."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False, markup=False)

    def evaluating(self, where: str) -> AbstractContextManager[Any]:
        return self.console.status(f"{where}: evaluating") if self.console.is_terminal else nullcontext()

    def continued(self, tries: int) -> None:
        if tries:
            self.line(f"continuing: {tries} tries are known")

    def line(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def tried(self, one: Try, progress: tuple[int, int], is_best: bool) -> None:
        where = f"[{progress[0]}/{progress[1]}] try {one.number}: {values_text(one.values)}"
        seconds = f"({one.merge_seconds:.1f} s + {one.evaluate_seconds:.1f} s)"
        best = "  best so far" if is_best else ""
        self.line(f"{where}  score {one.score:.6g}  {seconds}{best}")


def make_display(wanted: bool | None) -> Display:
    """Lines where they are wanted, or where nobody said and a person is looking."""
    return Lines() if (sys.stderr.isatty() if wanted is None else wanted) else Display()


def describe(result: SearchResult) -> str:
    """The scores, the best, how the tries were made, what was written where."""
    best = result.best
    tasks = ", ".join(f"{task} {score:.4g}" for task, score in best.tasks.items())
    lines = [bars(result.tries, best), f"best: {values_text(best.values)}, score {best.score:.6g} (try {best.number})"]
    lines += [f"  {tasks}"] if tasks else []
    lines.append(how(result))
    lines += [f"note: {note}" for note in result.notes]
    lines.append(f"tries: {result.work / FILE}" + (f", curve: {result.figure}" if result.figure else ""))
    lines += [f"model: {result.out}"] if result.out else []
    return "\n".join(lines)


def how(result: SearchResult) -> str:
    """How the models were made."""
    if result.anew:
        return f"each try was a merge of its own: {result.anew}"
    merged = f"{len(result.updates)} update(s) merged at scale 1 in {sum(result.updates):.1f} s"
    passes = sorted(one.merge_seconds for one in result.tries)
    return f"{merged}; each try is one pass over base and update, {passes[len(passes) // 2]:.1f} s"


def bars(tries: Sequence[Try], best: Try) -> str:
    """The scores as text, a line a value in ascending order; the longest bar is the largest score, the least has none.
    Of many tries the SHOWN nearest in score to the best are shown."""
    near = sorted(tries, key=lambda one: abs(one.score - best.score))[:SHOWN]
    ordered = sorted(near, key=lambda one: tuple(one.values.values()))
    low, high = min(one.score for one in near), max(one.score for one in near)
    names = list(best.values)
    cells = [[f"{one.values[name]:g}" for name in names] + [f"{one.score:.6g}"] for one in ordered]
    widths = [max(map(len, column)) for column in zip([*names, "score"], *cells, strict=True)]
    lines = ["  ".join(head.rjust(w) for head, w in zip([*names, "score"], widths, strict=True))]
    for one, row in zip(ordered, cells, strict=True):
        length = round(WIDTH * (one.score - low) / (high - low)) if high > low else WIDTH
        mark = f" {one.number}, best" if one is best else f" {one.number}"
        lines.append("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) + "  " + "█" * length + mark)
    if len(near) < len(tries):
        lines.append(f"({len(tries) - len(near)} more in search.json)")
    return "\n".join(lines)


def describe_sweep(result: SweepResult) -> str:
    """The settings with their scores and folders, and what was read how often."""
    cells = [[f"{value:g}" for value in row.values.values()] for row in result.rows]
    heads = list(result.rows[0].values)
    if any(row.score is not None for row in result.rows):
        heads.append("score")
        cells = [[*c, "" if r.score is None else f"{r.score:.6g}"] for c, r in zip(cells, result.rows, strict=True)]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = ["  ".join(head.rjust(w) for head, w in zip(heads, widths, strict=True))]
    for row, values in zip(result.rows, cells, strict=True):
        kept = row.folder if (result.out / row.folder).is_dir() else ""
        best = "  best" if row is result.best else ""
        lines.append(f"{'  '.join(c.rjust(w) for c, w in zip(values, widths, strict=True))}  {kept}{best}".rstrip())
    for one in result.passes:
        lines.append(f"{one.outputs} model(s) of one pass: {one.read / 1e9:.2f} GB read, {one.seconds:.1f} s")
    lines += [f"a pass each: {result.apart}"] if result.apart else []
    return "\n".join([*lines, f"table: {result.out / 'sweep.json'}"])
