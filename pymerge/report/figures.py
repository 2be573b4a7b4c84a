"""What a page shows: charts and tables in sections. A chart is data; the page draws it, and so does matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["line", "bar", "heatmap", "scatter", "histogram"]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Values over common places, one row a series.

    x        places: numbers, or names. heatmap: the columns; histogram: the bins (lower edge or label).
    series   name -> a value a place; None (or NaN, Inf) leaves a gap. heatmap: row -> values; histogram: counts.
    alt      what a reader who cannot see the chart should know: what is drawn, and what it shows.
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


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with paragraphs, charts and tables; `collapsed` is closed until the reader opens it."""

    heading: str
    text: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    collapsed: bool = False
