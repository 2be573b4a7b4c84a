"""The command line: arguments to recipe to engine, no decisions. Heavy imports are inside the commands."""

from __future__ import annotations

from typing import Annotated

import typer

from pymerge.version import __version__

app = typer.Typer(
    help="Merge fine-tuned models into one, without training, at the speed of the machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"pymerge {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
