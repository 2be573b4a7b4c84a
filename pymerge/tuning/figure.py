"""curve.png: scores against the values tried."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pymerge.tuning.over import Axis
from pymerge.tuning.record import Try

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports]

TASKS_NAMED = 12  # tasks that a legend has room for
ROOM_FOR_TEXT = 100  # cells of a heat map that have room for their score


def draw(path: Path, tries: Sequence[Try], best: Try, axes: Sequence[Axis]) -> tuple[Path | None, str]:
    """One hyperparameter: a curve; two: a heat map. Returns the path, or None and why there is no picture."""
    if len(axes) > 2:
        return None, "no curve.png: more than two hyperparameters"
    if find_spec("matplotlib") is None:
        return None, 'no curve.png: matplotlib is missing (pip install "pymerge[report]")'
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(8, 5), layout="constrained")
    place = figure.add_subplot()
    if len(axes) == 1:
        _curve(place, tries, best, axes[0].name)
    else:
        _heat_map(figure, place, tries, best, [axis.name for axis in axes])
    figure.savefig(path, dpi=120)
    return path, ""


def _curve(place: Axes, tries: Sequence[Try], best: Try, name: str) -> None:
    """The score as points, numbered in the order of trying; tasks as thin lines."""
    ordered = sorted(tries, key=lambda one: one.values[name])
    at = [one.values[name] for one in ordered]
    for task in best.tasks:
        label = task if len(best.tasks) <= TASKS_NAMED else None
        place.plot(at, [one.tasks[task] for one in ordered], linewidth=0.8, alpha=0.7, label=label)
    mean = "mean" if best.tasks else "score"
    place.plot(at, [one.score for one in ordered], "o-", color="black", markersize=4, linewidth=1.6, label=mean)
    for one in ordered:
        place.annotate(
            str(one.number),
            (one.values[name], one.score),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )
    place.plot(
        best.values[name],
        best.score,
        "*",
        color="tab:red",
        markersize=14,
        zorder=3,
        label=f"best: {best.values[name]:g}, {best.score:.4g}",
    )
    place.set_xlabel(name)
    place.set_ylabel("score")
    place.grid(alpha=0.3)
    place.legend(fontsize=8)


def _heat_map(figure, place: Axes, tries: Sequence[Try], best: Try, names: Sequence[str]) -> None:
    """A cell a pair of values, empty where none was tried."""
    across, up = (sorted({one.values[name] for one in tries}) for name in names)
    cells = [[float("nan")] * len(across) for _ in up]
    for one in tries:
        cells[up.index(one.values[names[1]])][across.index(one.values[names[0]])] = one.score
    picture = place.imshow(cells, origin="lower", aspect="auto", cmap="viridis")
    figure.colorbar(picture, label="score")
    if len(tries) <= ROOM_FOR_TEXT:
        middle = (min(one.score for one in tries) + max(one.score for one in tries)) / 2
        for one in tries:
            where = across.index(one.values[names[0]]), up.index(one.values[names[1]])
            dark = one.score < middle
            place.text(
                *where, f"{one.score:.4g}", ha="center", va="center", fontsize=8, color="white" if dark else "black"
            )
    where = across.index(best.values[names[0]]), up.index(best.values[names[1]])
    place.plot(*where, "s", markerfacecolor="none", color="tab:red", markersize=40, markeredgewidth=2)
    place.set_title(f"best: {best.score:.4g}", fontsize=10)
    place.set_xticks(range(len(across)), [f"{value:g}" for value in across])
    place.set_yticks(range(len(up)), [f"{value:g}" for value in up])
    place.set_xlabel(names[0])
    place.set_ylabel(names[1])
