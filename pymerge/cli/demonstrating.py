"""The demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pymerge.cli.app import app
from pymerge.cli.options import Debug, examples, reported_errors


@app.command(epilog=examples("pymerge demo", "pymerge demo --align"))
def demo(
    out: Annotated[Path, typer.Option(help="Where the models and results are kept.")] = Path("demo-output"),
    all_methods: Annotated[bool, typer.Option("--all", help="Every method, whatever the time.")] = False,
    align: Annotated[
        bool, typer.Option("--align", help="Part two: networks without a common start, their units aligned.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train a small model and four fine-tuned children, merge them with each method, compare. Under 3 minutes."""
    with reported_errors(debug):
        if align:
            from pymerge.demo.align import run as run_align

            run_align(out / "align")
        else:
            from pymerge.demo import run

            run(out, all_methods=all_methods)
