"""Commands that make many merges of one recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pymerge import hub
from pymerge.cli.app import app
from pymerge.cli.options import (
    AllowPickle,
    Debug,
    Device,
    DeviceMemory,
    Download,
    Memory,
    Prefer,
    RecipePath,
    ShardSize,
    Threads,
    budget,
    bytes_of,
    examples,
    parse_bytes,
    reported_errors,
)


@app.command(
    epilog=examples(
        "pymerge search recipe.yaml --eval evaluate.py:accuracy --over scale=0..1 -o best/",
        "pymerge search recipe.yaml --eval evaluate.py:accuracy --over density=0.1,0.2 --work grid.search",
    )
)
def search(
    recipe: RecipePath,
    evaluate: Annotated[
        str, typer.Option("--eval", help="FILE.py:FUNCTION, package.module:FUNCTION, or FILE.py, a program.")
    ],
    over: Annotated[list[str], typer.Option(help="NAME=LOW..HIGH, or NAME=VALUE,VALUE,... (once or more).")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the best model.")] = None,
    tolerance: Annotated[float, typer.Option(help="Of a range: how closely to bracket the best value.")] = 0.01,
    minimize: Annotated[bool, typer.Option("--minimize", help="The evaluation is a loss.")] = False,
    work: Annotated[Path | None, typer.Option(help="Folder for the tries. Default: RECIPE, ending in .search.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget the tries that are in the work folder.")] = False,
    memory: Memory = None,
    threads: Threads = None,
    device: Device = "cpu",
    device_memory: DeviceMemory = None,
    shard_size: ShardSize = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT once the best is complete.")] = False,
    allow_pickle: AllowPickle = False,
    prefer: Prefer = None,
    download: Download = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no plot.")] = False,
    debug: Debug = False,
) -> None:
    """Find the value of a hyperparameter at which the merged model scores best.

    A range is searched by golden sections, values are all tried. Over the scale, the models are merged once. An
    interrupted search continues when the same command is given again.
    """
    with reported_errors(debug), hub.access(download=download):
        from pymerge.engine.plan import Options
        from pymerge.recipe import Recipe
        from pymerge.tuning import search as run
        from pymerge.tuning.over import parse_overs
        from pymerge.tuning.show import describe

        options = Options(
            memory=budget(memory, Recipe.from_yaml(recipe), device),
            threads=threads,
            device=device,
            device_memory=bytes_of(device_memory),
            shard_bytes=parse_bytes(shard_size),
            overwrite=overwrite,
            allow_pickle=allow_pickle,
            prefer=prefer,
            progress=False if quiet else None,
        )
        found = run(
            recipe,
            evaluate,
            parse_overs(over),
            out=out,
            tolerance=tolerance,
            minimize=minimize,
            work=work,
            restart=restart,
            options=options,
            show=not quiet,
        )
        if not quiet:
            print(describe(found))
