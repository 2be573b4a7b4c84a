"""curve.png: scores against the values tried."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pymerge.tuning.over import Axis
from pymerge.tuning.record import Try
from pymerge.tuning.show import values_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

TASKS_NAMED = 12  # tasks that a legend has room for
ROOM_FOR_TEXT = 100  # cells of a heat map that have room for their score


def draw(path: Path, tries: Sequence[Try], best: Try, axes: Sequence[Axis]) -> tuple[Path | None, str]:
    """One hyperparameter: a curve; two: a heat map. Returns the path, or None and why there is no picture."""
    if len(axes) > 2:
        return None, "no curve.png: more than two hyperparameters"
    if find_spec("matplotlib") is None:
        return None, 'no curve.png: matplotlib is missing (pip install "pymerge[report]")'
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(9, 6), layout="constrained")
    if len(axes) == 1:
        _curve(figure, tries, best, axes[0].name)
    else:
        _heat_map(figure, tries, best, [axis.name for axis in axes])
    figure.savefig(path, dpi=120)
    return path, ""


def _curve(figure: Figure, tries: Sequence[Try], best: Try, name: str) -> None:
    """The score against the value, tasks as thin lines; below, when each value was tried."""
    place, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    ordered = sorted(tries, key=lambda one: one.values[name])
    at = [one.values[name] for one in ordered]
    for task in best.tasks:
        label = task if len(best.tasks) <= TASKS_NAMED else None
        place.plot(at, [one.tasks[task] for one in ordered], linewidth=0.8, alpha=0.7, label=label)
    mean = "mean" if best.tasks else "score"
    place.plot(at, [one.score for one in ordered], "o-", color="black", markersize=4, linewidth=1.6, label=mean)
    below.plot([one.values[name] for one in tries], [one.number for one in tries], ".-", color="grey", linewidth=0.6)
    for part, height in ((place, best.score), (below, best.number)):
        label = f"best: {best.values[name]:g}\nscore {best.score:.4g}\ntry {best.number}" if part is place else None
        part.plot(best.values[name], height, "*", color="tab:red", markersize=12, zorder=3, label=label)
        part.grid(alpha=0.3)
    place.set_ylabel("score")
    below.set_ylabel("try")
    below.yaxis.get_major_locator().set_params(integer=True)
    below.invert_yaxis()
    below.set_xlabel(name)
    figure.legend(loc="outside right upper", fontsize=8)


def _heat_map(figure: Figure, tries: Sequence[Try], best: Try, names: Sequence[str]) -> None:
    """A cell a pair of values, empty where none was tried."""
    from matplotlib.patches import Rectangle  # pyright: ignore[reportMissingImports]

    place = figure.add_subplot()
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
    place.add_patch(Rectangle((where[0] - 0.5, where[1] - 0.5), 1, 1, fill=False, edgecolor="tab:red", linewidth=3))
    place.set_title(f"best: {values_text(best.values)}, score {best.score:.4g}", fontsize=10)
    place.set_xticks(range(len(across)), [f"{value:g}" for value in across])
    place.set_yticks(range(len(up)), [f"{value:g}" for value in up])
    place.set_xlabel(names[0])
    place.set_ylabel(names[1])
