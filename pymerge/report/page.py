"""One HTML file with everything in it: charts by plotly, tables, both themes. It needs no network and asks for none."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from pymerge.errors import InputError, OutputError
from pymerge.report.figures import COLOURS, Chart, Section, Table, finite, printable

DIGITS = 6  # of numbers in a page
Cell = str | float | int | None


def write_page(path: str | Path, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Writes the page; about 2 MB, nearly all of it plotly, compressed.

    Every text is escaped, and the page's own policy runs no script but its two (by their hashes) and loads nothing.
    The same sections give the same bytes. Raises InputError without plotly, OutputError where it cannot be written."""
    page = html_of(title, subtitle, sections)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def html_of(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page as text; see `write_page`."""
    library, script, style = plotly_source(), _asset("page.js"), _asset("page.css")
    policy = (
        f"default-src 'none'; script-src {_hash(script)} {_hash(library)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    charts = [chart for section in sections for chart in section.charts]
    tables = [table for section in sections for table in section.tables]
    data = {
        "charts": [_chart_data(chart) for chart in charts],
        "tables": [_table_data(table) for table in tables],
        "colours": COLOURS,
    }
    # In base64 no name can end the element that holds it.
    packed = _packed(json.dumps(data, allow_nan=False, separators=(",", ":")))
    links = "".join(f'<li><a href="#s{n}">{_text(s.heading)}</a></li>' for n, s in enumerate(sections, start=1))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{style}</style>
</head>
<body>
<header><div><h1>{_text(title)}</h1><p>{_text(subtitle)}</p></div><button id="theme" type="button"></button></header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<p id="keys" hidden>The arrow keys go from value to value.</p>
<noscript><p class="missing">The charts and tables of this page need JavaScript.</p></noscript>
<main>
{"".join(_sections(sections))}</main>
<script type="application/octet-stream" id="data">{packed}</script>
<script type="application/octet-stream" id="plotly">{_packed(library)}</script>
<script>{script}</script>
</body>
</html>
"""


def plotly_source() -> str:
    """The JavaScript of the installed plotly."""
    try:
        from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError('a report page needs plotly: pip install "pymerge[report]"') from error
    return get_plotlyjs()


def _sections(sections: Sequence[Section]) -> Iterator[str]:
    chart_number = table_number = 0
    for number, section in enumerate(sections, start=1):
        opened = "" if section.collapsed else " open"
        yield f'<section><details id="s{number}"{opened}><summary><h2>{_text(section.heading)}</h2></summary>\n'
        for text in section.text:
            yield f"<pre>{_lines(text)}</pre>\n" if "\n" in text else f"<p>{_text(text)}</p>\n"
        for chart in section.charts:
            yield _figure(chart, chart_number)
            chart_number += 1
        for table in section.tables:
            yield f'<div class="table" data-number="{table_number}"><h3>{_text(table.title)}</h3></div>\n'
            table_number += 1
        yield "</details></section>\n"


def _figure(chart: Chart, number: int) -> str:
    return (
        f'<figure data-number="{number}"><h3>{_text(chart.title)}</h3>'
        f'<div class="plot" role="img" tabindex="0" aria-labelledby="c{number}" aria-describedby="keys"></div>'
        f'<p class="said" aria-live="polite"></p><figcaption id="c{number}">{_text(chart.alt)}</figcaption>'
        "<details><summary>Values as a table</summary></details></figure>\n"
    )


def _chart_data(chart: Chart) -> dict[str, Any]:
    return {
        "kind": chart.kind,
        "title": printable(chart.title),
        "x": [_cell(place) for place in chart.x],
        "named": chart.kind == "heatmap" or any(isinstance(place, str) for place in chart.x),
        "series": [(printable(name), [_cell(value) for value in values]) for name, values in chart.series.items()],
        "x_label": printable(chart.x_label),
        "y_label": printable(chart.y_label),
        "log_y": chart.log_y,
    }


def _table_data(table: Table) -> dict[str, Any]:
    return {
        "title": printable(table.title),
        "columns": [printable(name) for name in table.columns],
        "rows": [[_cell(cell) for cell in row] for row in table.rows],
    }


def _cell(value: Cell) -> Cell:
    if isinstance(value, str):
        return printable(value)
    if value is None or isinstance(value, int):
        return value
    value = finite(value)
    return None if value is None else float(f"{value:.{DIGITS}g}")


def _text(text: str) -> str:
    return escape(printable(text))


def _lines(text: str) -> str:
    return "\n".join(_text(line) for line in text.split("\n"))


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _hash(script: str) -> str:
    """The source expression of a script in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return (files("pymerge.report") / "assets" / name).read_text(encoding="utf-8")
