"""Options that several commands have, and what they mean."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pymerge.errors import MergeError, OutputError, RecipeError

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
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, several (cuda:0,cuda:1,cpu: the CPU takes element-wise work), or auto.")
]
DeviceMemory = Annotated[
    str | None, typer.Option(help="Of each device, e.g. 20GB. Default: four fifths of what is free there.")
]
ShardSize = Annotated[str, typer.Option(help="Largest size of an output file.")]
Debug = Annotated[bool, typer.Option("--debug", help="Log what is done; show the Python traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="For machines: a line of JSON twice a second, and at the end.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pytorch_model*.bin too (tensors only, no code is run).")
]
Prefer = Annotated[
    Literal["single", "sharded"] | None, typer.Option(help="single | sharded: which to read where a folder holds both.")
]

Simulate = Annotated[
    str | None,
    typer.Option(
        help="Predict the time on other machines, e.g. nodes=16,gpus=8,disk=5GB/s,net=100Gbit/s. What is not given is "
        "as here. Keys: nodes, gpus, cores, gpu (h100 or 60TFLOP/s), disk, read, write, storage, net, link, memory, "
        "single, double, eigen."
    ),
]
Shape = Annotated[
    str | None,
    typer.Option(
        help="Plan models of this shape, without weights: llama3-8b, llama3-70b, llama3-405b, mixtral-8x22b, "
        "deepseek-v3 or a config.json."
    ),
]
Download = Annotated[
    bool,
    typer.Option(
        "--download",
        help="Fetch models named as on the Hugging Face Hub that are not in its cache; read hf:// in place.",
    ),
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


def bytes_of(text: str | None) -> int | None:
    """As `parse_bytes`, where something is given."""
    return None if text is None else parse_bytes(text)


def budget(
    memory: str | None, recipe: Recipe | None = None, device: str = "cpu", *, by_torch: bool = False
) -> int | None:
    """What `--memory` leaves for the merge: the option counts the whole program, and with it the libraries that the
    merge will load. by_torch: it needs PyTorch, whatever the recipe."""
    from pymerge.engine.devices import start
    from pymerge.engine.process import resident_memory

    if memory is None:
        return None
    if recipe is not None and any(model.data for model in recipe.models):
        from pymerge.statistics.stream import load_libraries

        load_libraries()
    if by_torch or (recipe is not None and recipe.needs_torch):
        import pymerge.engine.generic  # noqa: F401
    start(device)
    return parse_bytes(memory) - resident_memory()


@contextmanager
def engine_of(name: str, address: str | None) -> Iterator[Callable[..., dict[str, Any]]]:
    """The function that merges to disk, connected before the memory of this process is counted."""
    if name == "local":
        if address is not None:
            raise RecipeError("--address goes with --engine ray")
        from pymerge.engine.local import merge_to_disk

        yield merge_to_disk
        return
    from pymerge.engine.on_ray import connected, merge_on_ray

    with connected(address):
        yield merge_on_ray


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
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # whoever reads has enough: click ends quietly
    except (MergeError, OSError) as error:
        if debug:
            raise
        from rich.console import Console
        from rich.text import Text

        text = Text.assemble((type(error).__name__, "bold red"), f": {error}")
        Console(stderr=True).print(text, soft_wrap=True)  # in colour on terminals, unless NO_COLOR is set
        if isinstance(error, MergeError):
            raise typer.Exit(error.exit_code) from None
        leave_unwritten()
        raise typer.Exit(OutputError.exit_code) from None


def leave_unwritten() -> None:
    """What standard output does not take is lost: it would be tried again, and fail again, at the end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
