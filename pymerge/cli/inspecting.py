"""The command that looks at models before they are merged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from pymerge import hub
from pymerge.cli.app import app
from pymerge.cli.options import (
    AllowPickle,
    Debug,
    Download,
    Memory,
    Prefer,
    Threads,
    budget,
    examples,
    reported_errors,
)
from pymerge.errors import OutputError


@app.command(
    epilog=examples(
        "pymerge inspect base/ math/ code/ -o report.html",
        "pymerge inspect base/ math/ --no-spectra --json found.json",
    )
)
def inspect(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder of the base model.")],
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders of models fine-tuned from it.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Page to write, report.html.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="File for all numbers, for machines.")] = None,
    png: Annotated[Path | None, typer.Option(help="Folder for each chart as a picture.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Folder for each chart as a drawing.")] = None,
    spectra: Annotated[
        bool, typer.Option("--spectra/--no-spectra", help="Singular values and shared directions: most of the time.")
    ] = True,
    rank: Annotated[int, typer.Option("--rank", "-r", min=1, help="Singular values of each matrix.")] = 16,
    exclude: Annotated[list[str] | None, typer.Option(help="Name patterns of tensors to leave out.")] = None,
    memory: Memory = None,
    threads: Threads = None,
    allow_pickle: AllowPickle = False,
    prefer: Prefer = None,
    download: Download = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")] = False,
    debug: Debug = False,
) -> None:
    """What fine-tuning changed, how the models agree, and which method that suggests."""
    with reported_errors(debug), hub.access(download=download):
        from pymerge.checkpoint.place import check_output_beside, check_output_file
        from pymerge.engine.plan import Options
        from pymerge.report.inspect_page import sections, subtitle
        from pymerge.report.inspection import inspect as run

        for file in filter(None, (out, as_json)):
            check_output_file(file, [base, *models])
        for folder in filter(None, (png, svg)):
            check_output_beside(folder, [base, *models])
        check_outputs(out, as_json)
        options = Options(
            memory=budget(memory, by_torch=spectra),
            threads=threads,
            allow_pickle=allow_pickle,
            prefer=prefer,
            progress=False if quiet else None,
        )
        found = run(base, models, spectra=spectra, rank=rank, exclude=exclude or (), options=options)
        if as_json is not None:
            write_text(as_json, json.dumps(found.to_dict(), indent=1))
        if out is not None:
            from pymerge.report.page import write_page

            write_page(out, "What fine-tuning changed", subtitle(found), sections(found))
        if png is not None or svg is not None:
            from pymerge.report.figures import write_figures

            if png is not None:
                write_figures(png, sections(found), "png")
            if svg is not None:
                write_figures(svg, sections(found), "svg")
        if not quiet:
            from pymerge.report.inspect_text import show

            show(found)


def check_outputs(out: Path | None, as_json: Path | None) -> None:
    """What would only fail at the end fails now."""
    if out is not None:
        from pymerge.report.page import plotly_source

        plotly_source()
    for path in (out, as_json):
        if path is None:
            continue
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise OutputError(f"{path}: cannot be written: it must be a file in a folder that can be written to")


def write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
