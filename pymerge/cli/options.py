"""Options that several commands have, and what they mean."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pymerge.errors import MergeError

if TYPE_CHECKING:
    from pymerge.engine.progress import Shown
    from pymerge.recipe import Recipe

UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; mergekit's run unchanged.")]
Memory = Annotated[
    str | None,
    typer.Option(help="Peak memory of the whole program, e.g. 1GB. Default: a quarter of what is free, at most 8 GB."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Compute threads. Default: all processors.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
ShardSize = Annotated[str, typer.Option(help="Largest size of an output file.")]
Debug = Annotated[bool, typer.Option("--debug", help="Log what is done; show the Python traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="For machines: a line of JSON twice a second, and at the end.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pytorch_model*.bin too (tensors only, no code is run).")
]
Prefer = Annotated[
    Literal["single", "sharded"] | None, typer.Option(help="single | sharded: which to read where a folder holds both.")
]

Download = Annotated[
    bool, typer.Option("--download", help="Fetch models named as on the Hugging Face Hub that are not in its cache.")
]


def examples(*lines: str) -> str:
    """The end of a command's help: lines to copy."""
    return "\n\n".join(["Examples:" if len(lines) > 1 else "Example:", *lines])


def parse_bytes(text: str) -> int:
    """`1GB`, `512MiB`, `1e9` in bytes."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([KMGT]?i?B?)\s*", text, re.IGNORECASE)
    unit = match and UNITS.get(
        match[2].upper() if match[2].upper().endswith("B") or not match[2] else match[2].upper() + "B"
    )
    if not match or not unit:
        raise typer.BadParameter(f"{text!r} is no size: write 800MB, 1GB or 1.5GiB")
    return int(float(match[1]) * unit)


def budget(memory: str | None, recipe: Recipe | None = None) -> int | None:
    """What `--memory` leaves for the merge: the option counts the whole program."""
    from pymerge.engine.process import resident_memory

    if memory is None:
        return None
    if recipe is not None and any(model.data for model in recipe.models):
        from pymerge.statistics.stream import load_libraries

        load_libraries()
    return parse_bytes(memory) - resident_memory()


def print_result(out: Path, summary: Mapping[str, Any], said: Sequence[str] = ()) -> None:
    """The closing lines of a merge: size, speed, memory, and the notes that were not said before."""
    rate = summary["bytes_read"] / max(summary["seconds"], 1e-9) / 1e9
    print(
        f"{out}: {sum(summary['tensors'].values())} tensors, {summary['bytes_written'] / 1e9:.2f} GB in "
        f"{summary['seconds']:.1f} s ({rate:.1f} GB/s read), "
        f"peak memory {summary['peak_rss_bytes'] / 1e9:.2f} GB"
    )
    for note in summary["notes"]:
        if note not in said:
            print(f"  note: {note}")


def progress_of(quiet: bool, as_json: bool) -> Shown:
    """What the two options ask for; --quiet leaves the closing line of --json."""
    return False if quiet else "json" if as_json else None


@contextmanager
def reported_errors(debug: bool) -> Iterator[None]:
    """One message and the exit code of the error; no traceback unless asked for."""
    if debug:
        logging.basicConfig(level=logging.DEBUG, format="%(asctime)s %(name)s: %(message)s")
    try:
        yield
    except MergeError as error:
        if debug:
            raise
        from rich.console import Console
        from rich.text import Text

        text = Text.assemble((type(error).__name__, "bold red"), f": {error}")
        Console(stderr=True).print(text, soft_wrap=True)  # in colour on terminals, unless NO_COLOR is set
        raise typer.Exit(error.exit_code) from None
