"""Commands that say what there is."""

from __future__ import annotations

import json
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
