"""Commands that merge, say what a merge would do, and check what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pymerge import hub
from pymerge.cli.app import app
from pymerge.cli.options import (
    AllowPickle,
    Debug,
    Device,
    DeviceMemory,
    Download,
    Json,
    Memory,
    Prefer,
    RecipePath,
    Shape,
    ShardSize,
    Simulate,
    Threads,
    budget,
    bytes_of,
    engine_of,
    examples,
    parse_bytes,
    print_result,
    progress_of,
    reported_errors,
)
from pymerge.engine.progress import print_event
from pymerge.errors import RecipeError

SUMMED = ("tensors", "bytes_read", "bytes_written", "seconds", "peak_rss_bytes", "notes")  # of merge.json, by --json


def print_adapter(out: Path, found: dict[str, Any], quiet: bool, as_json: bool) -> None:
    from pymerge.engine.adapter_out import describe_adapter

    if as_json:
        kept = {key: found[key] for key in ("r", "matrices", "whole", "left_out", "error", "notes")}
        print_event("merged", out=str(out), **kept)
    elif not quiet:
        print(describe_adapter(out, found))


@app.command(
    epilog=examples("pymerge merge recipe.yaml merged/", "pymerge merge recipe.yaml merged/ --memory 8GB --overwrite")
)
def merge(
    recipe: RecipePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    memory: Memory = None,
    threads: Threads = None,
    device: Device = "cpu",
    device_memory: DeviceMemory = None,
    shard_size: ShardSize = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT once the new model is complete.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start afresh instead of continuing an interrupted merge.")
    ] = False,
    allow_pickle: AllowPickle = False,
    prefer: Prefer = None,
    download: Download = False,
    as_adapter: Annotated[
        bool, typer.Option("--as-adapter", help="Write a LoRA adapter of the base in place of a whole model.")
    ] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="Of that adapter. Default: that of the merged ones.")] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="ray: on a Ray cluster; memory and threads are a worker's.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="auto or HOST:PORT. Default: a cluster that runs here, else a new one."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no closing line.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge the models of RECIPE into the folder OUT.

    OUT appears complete or not at all. An interrupted merge continues when the same command is given again.
    """
    with reported_errors(debug), hub.access(download=download), engine_of(engine, address) as merge_to_disk:
        from pymerge.engine.plan import Options
        from pymerge.recipe import Recipe

        described = Recipe.from_yaml(recipe)
        options = Options(
            memory=budget(memory, described, device, by_torch=as_adapter),
            threads=threads,
            device=device,
            device_memory=bytes_of(device_memory),
            shard_bytes=parse_bytes(shard_size),
            overwrite=overwrite,
            resume=not restart,
            allow_pickle=allow_pickle,
            prefer=prefer,
            progress=progress_of(quiet, as_json),
        )
        if as_adapter:
            if engine != "local":
                raise RecipeError("--as-adapter goes with the engine local")
            from pymerge.engine.adapter_out import merge_to_adapter

            found = merge_to_adapter(described, out, rank, options)
            return print_adapter(out, found, quiet, as_json)
        if rank is not None:
            raise RecipeError("--rank goes with --as-adapter")
        summary = merge_to_disk(described, out, options)
        if as_json:
            print_event("merged", out=str(out), **{key: summary[key] for key in SUMMED})
        elif not quiet:
            print_result(out, summary)


@app.command("extract-lora", epilog=examples("pymerge extract-lora math/ base/ --rank 16 -o math-lora/"))
def extract_lora(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, or URL, of the fine-tuned model.")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder, or URL, of its base.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Adapter folder to write; must not exist.")],
    rank: Annotated[int, typer.Option("--rank", "-r", min=1, help="Of the factors of each matrix.")] = 32,
    exclude: Annotated[list[str] | None, typer.Option(help="Name patterns of tensors to leave at the base.")] = None,
    memory: Memory = None,
    threads: Threads = None,
    allow_pickle: AllowPickle = False,
    prefer: Prefer = None,
    download: Download = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no closing line.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write what MODEL has more than BASE as a LoRA adapter: the best of that rank for each matrix."""
    with reported_errors(debug), hub.access(download=download):
        from pymerge.engine.adapter_out import extract
        from pymerge.engine.plan import Options

        options = Options(
            memory=budget(memory, by_torch=True),
            threads=threads,
            allow_pickle=allow_pickle,
            prefer=prefer,
            progress=progress_of(quiet, as_json),
        )
        found = extract(model, base, out, rank, exclude=exclude or [], options=options)
        print_adapter(out, found, quiet, as_json)


@app.command(epilog=examples("pymerge plan recipe.yaml", "pymerge plan recipe.yaml --memory 8GB --json"))
def plan(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="YAML file; none with --method.")] = None,
    memory: Memory = None,
    threads: Threads = None,
    device: Device = "cpu",
    device_memory: DeviceMemory = None,
    shard_size: ShardSize = "5GB",
    allow_pickle: AllowPickle = False,
    prefer: Prefer = None,
    download: Download = False,
    simulate: Simulate = None,
    shape: Shape = None,
    method: Annotated[str | None, typer.Option(help="With --shape, in place of a recipe: at its defaults.")] = None,
    models: Annotated[
        int | None, typer.Option(min=1, help="How many that merges, beside the base. Default: 2.")
    ] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure this machine for estimates, first.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    debug: Debug = False,
) -> None:
    """Say what `merge` would do: every problem, bytes, memory, an estimate of the time. Computes nothing."""
    with reported_errors(debug), hub.access(download=download):
        from pymerge.cli.planning import Asked, calibrated, planned, said
        from pymerge.engine.plan import Options
        from pymerge.recipe import Recipe

        described = Recipe.from_yaml(recipe, models_must_exist=shape is None) if recipe is not None else None
        asked = Asked(recipe=described, simulate=simulate, shape=shape, method=method, models=models)
        asked.check(calibrate)
        if calibrate:
            calibrated(as_json and asked.nothing)
        if asked.nothing:
            return
        options = Options(
            memory=budget(memory, described, device),
            threads=threads,
            device=device,
            device_memory=bytes_of(device_memory),
            shard_bytes=parse_bytes(shard_size),
            allow_pickle=allow_pickle,
            prefer=prefer,
        )
        said(asked, *planned(asked, options), as_json)


@app.command(epilog=examples("pymerge verify merged/", "pymerge verify merged/ --load --against recipe.yaml"))
def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that `merge` wrote.")],
    load: Annotated[bool, typer.Option("--load", help="Load it with its library too.")] = False,
    against: Annotated[Path | None, typer.Option(help="A recipe: is it what that makes of its inputs now?")] = None,
    allow_pickle: AllowPickle = False,
    prefer: Prefer = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no closing line.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read a merged model again: checksums of every tensor, headers, finite values, agreement with config.json."""
    with reported_errors(debug):
        from pymerge.engine.plan import Options
        from pymerge.engine.verify import verify as check

        options = Options(allow_pickle=allow_pickle, prefer=prefer, progress=progress_of(quiet, as_json))
        found = check(out, load=load, against=against, options=options)
        if as_json:
            return print_event("verified", out=str(out), **found)
        of_recipe, loads = f", of {against}" if against else "", ", loads" if load else ""
        if not quiet:
            print(f"{out}: {found['tensors']} tensors, {found['bytes'] / 1e9:.2f} GB, all as written{of_recipe}{loads}")
