"""What a page shows: charts and tables in sections. A chart is data; the page draws it, and so does matplotlib."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pymerge.errors import InputError, OutputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

COLOURS = ("#4878a8", "#d1495b", "#3a9a6c", "#c98a1b", "#8661b0", "#2b9db5", "#b5586f", "#7b8b3c")  # on light and dark
TICKS = 24  # names along an axis of a picture
SERIES_NAMED = 16  # that a legend has room for

Kind = Literal["line", "bar", "heatmap", "scatter", "histogram"]


@dataclass(frozen=True)
class Chart:
    """Values over common places, one row a series.

    x        places: numbers, or names. heatmap: the columns; histogram: the bins (lower edge or label).
    series   name -> a value a place; None (or NaN, Inf) leaves a gap. heatmap: row -> values; histogram: counts.
    alt      the caption, which is all that a reader has who cannot see the chart: what is drawn, and what it shows.
    log_y    the value axis (heatmap: the colours) is logarithmic; values <= 0 are gaps then.
    Raises   ValueError: unknown kind, no series, or a series of another length than x."""

    kind: Kind
    title: str
    x: Sequence[float | str]
    series: Mapping[str, Sequence[float | None]]
    x_label: str
    y_label: str
    alt: str
    log_y: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"chart {self.title!r}: kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}"
            )
        if not self.series:
            raise ValueError(f"chart {self.title!r}: no series")
        for name, values in self.series.items():
            if len(values) != len(self.x):
                raise ValueError(
                    f"chart {self.title!r}: series {name!r} has {len(values)} values at {len(self.x)} places"
                )


@dataclass(frozen=True)
class Table:
    """Rows that a reader can sort and filter; a cell None is empty.

    Raises   ValueError: a row of another length than columns."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}: a row has {len(row)} cells, there are {len(self.columns)} columns"
                )


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, charts and tables; `collapsed` is closed until the reader opens it.

    A text with line breaks in it is shown as it stands, like code."""

    heading: str
    text: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    collapsed: bool = False


def printable(text: str) -> str:
    """Names come from strangers' files: control characters and the like as their escape sequences."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def finite(value: float | None, *, positive: bool = False) -> float | None:
    """The value, or None where there is nothing to draw."""
    return value if value is not None and math.isfinite(value) and (value > 0 or not positive) else None


def write_figures(folder: str | Path, sections: Sequence[Section], format: Literal["png", "svg"] = "png") -> list[Path]:
    """Every chart of the sections as a picture of its own, `01-title.png` and on, for papers.

    The same charts give the same bytes. Raises InputError without matplotlib, OutputError where nothing can be written.
    """
    try:
        from matplotlib import rc_context  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError('figures need matplotlib: pip install "pymerge[report]"') from error
    charts, written = [chart for section in sections for chart in section.charts], []
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "pymerge", "font.size": 9}):
        for number, chart in enumerate(charts, start=1):
            slug = re.sub(r"[^a-z0-9]+", "-", chart.title.lower())[:60].strip("-")
            path = Path(folder) / f"{number:02d}-{slug or chart.kind}.{format}"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                draw(chart).savefig(path, dpi=150, metadata={"Date": None} if format == "svg" else None)
            except OSError as error:
                raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
            written.append(path)
    return written


def draw(chart: Chart) -> Figure:
    """The chart by matplotlib."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if chart.kind == "heatmap":
        _draw_heatmap(chart, figure, axes)
    else:
        _draw_series(chart, axes)
    axes.set_title(_shown(chart.title), fontsize=11)
    axes.set_xlabel(_shown(chart.x_label))
    axes.set_ylabel(_shown(chart.y_label))
    return figure


def _shown(text: str) -> str:
    """A name for matplotlib: a "$" in it begins no formula."""
    return printable(text).replace("$", r"\$")


def _draw_series(chart: Chart, axes: Any) -> None:
    named = any(isinstance(place, str) for place in chart.x)
    at = list(range(len(chart.x))) if named else [float(place) for place in chart.x]
    if named:
        _name_ticks(axes.xaxis, [str(place) for place in chart.x])
        axes.set_xlim(-0.5, len(chart.x) - 0.5)
    if chart.log_y:
        axes.set_yscale("log")
    steps = [after - before for before, after in zip(at, at[1:], strict=False)]
    room = 1.0 if chart.kind == "histogram" else 0.8
    width = room * min((step for step in steps if step > 0), default=1.0) / len(chart.series)
    drawn = []
    for number, (name, values) in enumerate(chart.series.items()):
        heights = [math.nan if (v := finite(value, positive=chart.log_y)) is None else v for value in values]
        look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "label": " " + _shown(name)}
        if chart.kind == "line":
            drawn += axes.plot(at, heights, marker="o", markersize=2.5, linewidth=1.2, **look)
        elif chart.kind == "scatter":
            drawn += axes.plot(at, heights, "o", markersize=3, alpha=0.7, **look)
        else:
            shift = (number - (len(chart.series) - 1) / 2) * width
            drawn.append(axes.bar([place + shift for place in at], heights, width=width, **look))
    axes.grid(axis="y" if named else "both", alpha=0.3)
    if len(chart.series) > 1:
        axes.legend(handles=drawn[:SERIES_NAMED], fontsize=7, loc="best")


def _draw_heatmap(chart: Chart, figure: Figure, axes: Any) -> None:
    from matplotlib.colors import LogNorm  # pyright: ignore[reportMissingImports]

    found = {name: [finite(value, positive=chart.log_y) for value in row] for name, row in chart.series.items()}
    cells = [[math.nan if value is None else value for value in row] for row in found.values()]
    some = any(value is not None for row in found.values() for value in row)
    norm = LogNorm() if chart.log_y and some else None
    picture = axes.imshow(cells, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
    figure.colorbar(picture)
    _name_ticks(axes.xaxis, [str(place) for place in chart.x])
    _name_ticks(axes.yaxis, list(chart.series))


def _name_ticks(axis: Any, names: Sequence[str]) -> None:
    """Names at their places, as many as have room, the ends of the long ones."""
    step = max(1, -(-len(names) // TICKS))
    labels = [printable(name) for name in names[::step]]
    labels = [_shown(label if len(label) <= 40 else "\u2026" + label[-39:]) for label in labels]
    axis.set_ticks(range(0, len(names), step), labels)
    if axis.axis_name == "x" and sum(map(len, labels)) > 60:
        axis.set_tick_params(rotation=60, labelsize=7)
        for text in axis.get_ticklabels():
            text.set_horizontalalignment("right")
