"""The command line: arguments to recipe to engine, no decisions. Heavy imports are inside the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from pymerge import hub
from pymerge.cli_options import (
    AllowPickle,
    Debug,
    Device,
    Download,
    Memory,
    Prefer,
    RecipePath,
    ShardSize,
    Threads,
    budget,
    parse_bytes,
    print_result,
    reported_errors,
)
from pymerge.errors import RecipeError
from pymerge.version import __version__

app = typer.Typer(
    help="Merge fine-tuned models into one, without training, at the speed of the machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)


@app.command()
def merge(
    recipe: RecipePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    memory: Memory = None,
    threads: Threads = None,
    device: Device = "cpu",
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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no closing line.")] = False,
    debug: Debug = False,
) -> None:
    """Merge the models of RECIPE into the folder OUT.

    OUT appears complete or not at all. An interrupted merge continues when the same command is given again.
    """
    with reported_errors(debug), hub.access(download=download):
        from pymerge.engine.local import merge_to_disk
        from pymerge.engine.plan import Options
        from pymerge.recipe import Recipe

        described = Recipe.from_yaml(recipe)
        options = Options(
            memory=budget(memory, described),
            threads=threads,
            device=device,
            shard_bytes=parse_bytes(shard_size),
            overwrite=overwrite,
            resume=not restart,
            allow_pickle=allow_pickle,
            prefer=prefer,
            progress=False if quiet else None,
        )
        if as_adapter:
            from pymerge.engine.adapter_out import describe_adapter, merge_to_adapter

            found = merge_to_adapter(described, out, rank, options)
            return None if quiet else print(describe_adapter(out, found))
        if rank is not None:
            raise RecipeError("--rank goes with --as-adapter")
        summary = merge_to_disk(described, out, options)
        if not quiet:
            print_result(out, summary)


@app.command("extract-lora")
def extract_lora(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of the fine-tuned model.")],
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Folder of its base.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Adapter folder to write; must not exist.")],
    rank: Annotated[int, typer.Option("--rank", "-r", min=1, help="Of the factors of each matrix.")] = 32,
    exclude: Annotated[list[str] | None, typer.Option(help="Name patterns of tensors to leave at the base.")] = None,
    memory: Memory = None,
    threads: Threads = None,
    allow_pickle: AllowPickle = False,
    prefer: Prefer = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no closing line.")] = False,
    debug: Debug = False,
) -> None:
    """Write what MODEL has more than BASE as a LoRA adapter: the best of that rank for each matrix."""
    with reported_errors(debug):
        from pymerge.engine.adapter_out import describe_adapter, extract
        from pymerge.engine.plan import Options

        options = Options(
            memory=budget(memory),
            threads=threads,
            allow_pickle=allow_pickle,
            prefer=prefer,
            progress=False if quiet else None,
        )
        found = extract(model, base, out, rank, exclude=exclude or [], options=options)
        if not quiet:
            print(describe_adapter(out, found))


@app.command()
def plan(
    recipe: RecipePath,
    memory: Memory = None,
    threads: Threads = None,
    device: Device = "cpu",
    shard_size: ShardSize = "5GB",
    allow_pickle: AllowPickle = False,
    prefer: Prefer = None,
    download: Download = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    debug: Debug = False,
) -> None:
    """Say what `merge` would do: every problem, bytes, memory, an estimate of the time. Computes nothing."""
    with reported_errors(debug), hub.access(download=download):
        from pymerge.engine.describe import describe_plan, show_plan
        from pymerge.engine.local import plan_merge
        from pymerge.engine.plan import Options
        from pymerge.recipe import Recipe

        described = Recipe.from_yaml(recipe)
        options = Options(
            memory=budget(memory, described),
            threads=threads,
            device=device,
            shard_bytes=parse_bytes(shard_size),
            allow_pickle=allow_pickle,
            prefer=prefer,
        )
        planned = plan_merge(described, options)
        if as_json:
            print(json.dumps(describe_plan(planned, options), indent=1))
        else:
            show_plan(planned, options)


@app.command()
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


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that `merge` wrote.")],
    load: Annotated[bool, typer.Option("--load", help="Load it with its library too.")] = False,
    against: Annotated[Path | None, typer.Option(help="A recipe: is it what that makes of its inputs now?")] = None,
    allow_pickle: AllowPickle = False,
    prefer: Prefer = None,
    debug: Debug = False,
) -> None:
    """Read a merged model again: checksums of every tensor, headers, finite values, agreement with config.json."""
    with reported_errors(debug):
        from pymerge.engine.plan import Options
        from pymerge.engine.verify import verify as check

        found = check(out, load=load, against=against, options=Options(allow_pickle=allow_pickle, prefer=prefer))
        of_recipe, loads = f", of {against}" if against else "", ", loads" if load else ""
        print(f"{out}: {found['tensors']} tensors, {found['bytes'] / 1e9:.2f} GB, all as written{of_recipe}{loads}")


@app.command()
def info(
    fast: Annotated[bool, typer.Option("--fast", help="Without importing torch.")] = False,
    debug: Debug = False,
) -> None:
    """What is installed here: version, processor level, devices, which operator is native where."""
    with reported_errors(debug):
        from pymerge.engine.describe import show_info

        show_info(fast)


@app.command()
def observe(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of the fine-tuned model.")],
    data: Annotated[
        Path, typer.Option(help="Samples of its task: .jsonl, .txt, a folder of images, a dataset folder.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, X.stats.safetensors.")],
    samples: Annotated[int, typer.Option(min=1, help="How many samples to run.")] = 32,
    length: Annotated[int, typer.Option(min=1, help="Longest sample, tokens.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples run at once.")] = 8,
    field: Annotated[str, typer.Option(help="Key of the text in .jsonl and datasets.")] = "text",
    targets: Annotated[
        list[str] | None, typer.Option(help="Name patterns of modules; default: all linear ones.")
    ] = None,
    float64: Annotated[bool, typer.Option("--float64", help="Sums in float64.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read weights module by module: for models that do not fit in memory.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Run MODEL over a few samples and keep what its linear layers see, for methods that need statistics."""
    with reported_errors(debug):
        from pymerge.statistics.observing import observe as run
        from pymerge.statistics.samples import batches_of

        at_once = samples if stream else batch_size
        batches = batches_of(model, data, samples=samples, length=length, batch_size=at_once, field=field)
        dtype = "float64" if float64 else "float32"
        found = run(model, batches, targets=targets or (), dtype=dtype, stream_to=out if stream else None)
        if not stream:
            found.save(out)
        rows = max(found.rows.values())
        holders = len(set(found.header.modules.values()))
        print(f"{out}: {len(found.modules)} layers, {holders} distinct inputs, {rows} rows")


@app.command()
def align(
    models: Annotated[list[str], typer.Argument(metavar="A B [C ..]", help="Folders; all are brought to A's order.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, perms.safetensors.")],
    data: Annotated[
        str | None,
        typer.Option(help="Samples for all models: .jsonl, .txt, images, a dataset folder. Without: weights alone."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="How many samples to run. Default: 64.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Longest sample, tokens. Default: 128.")] = None,
    field: Annotated[str | None, typer.Option(help="Key of the text in .jsonl and datasets. Default: text.")] = None,
    alpha: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="The weights' share; the rest is the activations'. Default: 0.5 with data."),
    ] = None,
    mode: Annotated[
        Literal["permute", "zip"], typer.Option(help="permute | zip: one to one, or many to one.")
    ] = "permute",
    spec: Annotated[str | None, typer.Option(help="Architecture. Default: by config.json.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order in which groups are visited.")] = 0,
    tie_heads: Annotated[
        bool, typer.Option("--tie-heads/--no-tie-heads", help="One order of heads for q, k and v.")
    ] = True,
    memory: Annotated[
        str, typer.Option(help="For what is kept between sweeps; what does not fit is computed again.")
    ] = "2GB",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")] = False,
    debug: Debug = False,
) -> None:
    """Find which unit of B is which unit of A, by weights and by activations; `align:` of a recipe takes the file."""
    with reported_errors(debug):
        if out.suffix != ".safetensors":
            raise RecipeError(f"--out {out}: must end in .safetensors")
        from pymerge.engine.alignment import find, parsed_search
        from pymerge.engine.describe import show_alignment
        from pymerge.engine.progress import sweeps_shown

        asked = {"data": data, "samples": samples, "length": length, "field": field, "alpha": alpha, "mode": mode}
        search = parsed_search(asked | {"spec": spec, "seed": seed, "tie_heads": tie_heads})
        with sweeps_shown(False if quiet else None) as progress:
            found = find(models, search, memory=parse_bytes(memory), progress=progress)
        found.save(out)
        if not quiet:
            show_alignment(found)
            print(f"{out}: to be used as `align: {out}` in a recipe of these models")


@app.command()
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
    shard_size: ShardSize = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT once the best is complete.")] = False,
    allow_pickle: AllowPickle = False,
    prefer: Prefer = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no plot.")] = False,
    debug: Debug = False,
) -> None:
    """Find the value of a hyperparameter at which the merged model scores best.

    A range is searched by golden sections, values are all tried. Over the scale, the models are merged once. An
    interrupted search continues when the same command is given again.
    """
    with reported_errors(debug):
        from pymerge.engine.plan import Options
        from pymerge.recipe import Recipe
        from pymerge.tuning import search as run
        from pymerge.tuning.over import parse_overs
        from pymerge.tuning.show import describe

        options = Options(
            memory=budget(memory, Recipe.from_yaml(recipe)),
            threads=threads,
            device=device,
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


@app.command()
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


def main() -> None:
    """Entry point of the `pymerge` command."""
    app()


if __name__ == "__main__":
    main()
