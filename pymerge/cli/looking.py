"""Commands that say what there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pymerge.cli.app import app
from pymerge.cli.options import Debug, examples, reported_errors


@app.command(epilog=examples("pymerge methods", "pymerge methods ties"))
def methods(
    name: Annotated[str | None, typer.Argument(help="Describe this method.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    debug: Debug = False,
) -> None:
    """List the merge methods, or describe one: its parameters, defaults, ranges, paper."""
    with reported_errors(debug):
        from pymerge import methods as known
        from pymerge.engine.describe import plain_method, show_method, show_methods

        if as_json:
            found = [known.describe(n) for n in ([name] if name else known.list())]
            print(json.dumps([plain_method(method) for method in found], indent=1))
        elif name:
            show_method(known.describe(name))
        else:
            show_methods([known.describe(n) for n in known.list()])


@app.command(epilog=examples("pymerge info"))
def info(
    fast: Annotated[bool, typer.Option("--fast", help="Without importing torch.")] = False,
    debug: Debug = False,
) -> None:
    """What is installed here: version, processor level, devices, which operator is native where."""
    with reported_errors(debug):
        from pymerge.engine.describe import show_info

        show_info(fast)


@app.command(epilog=examples("pymerge report merged/", "pymerge report merged/ -o ties.html --svg figures/"))
def report(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that `merge` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(help="Folder for each chart as a PNG.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Folder for each chart as an SVG, for papers.")] = None,
    debug: Debug = False,
) -> None:
    """Make a page about a merged model: recipe, times, memory, what the methods noted. Reads merge.json alone."""
    with reported_errors(debug):
        from pymerge.report.merge_page import report as make

        for path in make(folder, out, png=png, svg=svg):
            print(path)
