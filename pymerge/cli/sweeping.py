"""The command that makes many merges of one recipe in one pass."""

from __future__ import annotations

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
    RecipePath,
    ShardSize,
    Threads,
    budget,
    examples,
    parse_bytes,
    reported_errors,
)


@app.command(
    epilog=examples(
        "pymerge sweep recipe.yaml --grid density=0.1,0.2 --grid scale=0.5,1.0 --out swept/",
        "pymerge sweep recipe.yaml --grid density=0.1,0.2 --out scores/ --eval evaluate.py:accuracy --discard",
    )
)
def sweep(
    recipe: RecipePath,
    grid: Annotated[list[str], typer.Option(help="NAME=VALUE,VALUE,... (once or more: all combinations).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for sweep.json and a folder for each combination.")],
    evaluate: Annotated[
        str | None, typer.Option("--eval", help="FILE.py:FUNCTION, package.module:FUNCTION, or FILE.py, a program.")
    ] = None,
    minimize: Annotated[bool, typer.Option("--minimize", help="The evaluation is a loss.")] = False,
    discard: Annotated[bool, typer.Option("--discard", help="Delete each model when its score is known.")] = False,
    memory: Memory = None,
    threads: Threads = None,
    shard_size: ShardSize = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace models in OUT that are not of it.")] = False,
    allow_pickle: AllowPickle = False,
    prefer: Prefer = None,
    download: Download = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")] = False,
    debug: Debug = False,
) -> None:
    """Merge at every combination of a grid of hyperparameters, reading the inputs once for all.

    Each folder holds what `merge` writes at these values. An interrupted sweep continues when the same command is given
    again.
    """
    with reported_errors(debug), hub.access(download=download):
        from pymerge.engine.plan import Options
        from pymerge.recipe import Recipe
        from pymerge.tuning import sweep as run
        from pymerge.tuning.over import parse_overs
        from pymerge.tuning.show import describe_sweep

        options = Options(
            memory=budget(memory, Recipe.from_yaml(recipe)),
            threads=threads,
            shard_bytes=parse_bytes(shard_size),
            overwrite=overwrite,
            allow_pickle=allow_pickle,
            prefer=prefer,
            progress=False if quiet else None,
        )
        found = run(
            recipe,
            parse_overs(grid, "grid"),
            out=out,
            evaluate=evaluate,
            minimize=minimize,
            discard=discard,
            options=options,
            show=not quiet,
        )
        if not quiet:
            print(describe_sweep(found))
