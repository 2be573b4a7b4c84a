"""Commands that find what some merges need beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pymerge.cli.app import app
from pymerge.cli.options import Debug, examples, parse_bytes, reported_errors
from pymerge.errors import RecipeError


@app.command(
    epilog=examples(
        "pymerge observe math/ --data math.jsonl -o math.stats.safetensors",
        "pymerge observe math/ --data math.jsonl -o math.stats.safetensors --stream --samples 64",
    )
)
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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    debug: Debug = False,
) -> None:
    """Run MODEL over a few samples and keep what its linear layers see, for methods that need statistics."""
    with reported_errors(debug):
        from pymerge.checkpoint.place import check_output_file
        from pymerge.engine.progress import status_shown
        from pymerge.statistics.observing import observe as run
        from pymerge.statistics.samples import batches_of

        check_output_file(out, [model, data])
        at_once = samples if stream else batch_size
        batches = batches_of(model, data, samples=samples, length=length, batch_size=at_once, field=field)
        dtype = "float64" if float64 else "float32"
        with status_shown(False if quiet else None, f"running {model}") as progress:
            stream_to = out if stream else None
            found = run(model, batches, targets=targets or (), dtype=dtype, stream_to=stream_to, progress=progress)
        if not stream:
            found.save(out)
        rows = max(found.rows.values())
        holders = len(set(found.header.modules.values()))
        print(f"{out}: {len(found.modules)} layers, {holders} distinct inputs, {rows} rows")


@app.command(
    epilog=examples(
        "pymerge align a/ b/ -o perms.safetensors",
        "pymerge align a/ b/ --data samples.jsonl -o perms.safetensors",
    )
)
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
        from pymerge.checkpoint.place import check_output_file
        from pymerge.engine.alignment import find, parsed_search
        from pymerge.engine.describe import show_alignment
        from pymerge.engine.progress import status_shown

        check_output_file(out, models if data is None else [*models, data])
        asked = {"data": data, "samples": samples, "length": length, "field": field, "alpha": alpha, "mode": mode}
        search = parsed_search(asked | {"spec": spec, "seed": seed, "tie_heads": tie_heads})
        with status_shown(False if quiet else None, "activations and first matches") as show:

            def swept(sweep: int, similarity: float) -> None:
                if show is not None:
                    show(f"sweep {sweep}: similarity {similarity:.4f}")

            found = find(models, search, memory=parse_bytes(memory), progress=swept)
        found.save(out)
        if not quiet:
            show_alignment(found)
            print(f"{out}: to be used as `align: {out}` in a recipe of these models")
