"""`pymerge-yaml` and `pymerge-multi`: the command lines of mergekit-yaml and mergekit-multi, served by pymerge."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pymerge.cli.options import (
    AllowPickle,
    Debug,
    Download,
    Memory,
    Prefer,
    budget,
    examples,
    print_result,
    reported_errors,
)
from pymerge.integrations.mergekit_options import NO_EFFECT, MergekitOptions

SAME, OURS, IDLE = "as in mergekit", "of pymerge", "accepted, no effect, because"


def same(*names: str, text: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=SAME, **more)


def idle(name: str, *spelt: str, **more: Any) -> Any:
    """An option that mergekit has; spelt --name where not said."""
    text = f"{NO_EFFECT[name]}."
    return typer.Option(*(spelt or (f"--{name.replace('_', '-')}",)), help=text, rich_help_panel=IDLE, **more)


def idle_flag(name: str) -> Any:
    flag = name.replace("_", "-")
    return idle(name, f"--{flag}/--no-{flag}", show_default=False)


Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="mergekit's YAML file.")]
Cuda = Annotated[bool, same("--cuda/--no-cuda", text="Merge on the GPU.")]
Device = Annotated[str | None, same("--device", text="Merge on this device: cpu, cuda, cuda:1, auto.")]
NumThreads = Annotated[int | None, same("--num-threads", "-j", text="Compute threads. Default: all processors.", min=1)]
GpuRich = Annotated[bool, same("--gpu-rich", text="As --cuda.")]
ShardSize = Annotated[
    str,
    same(
        "--out-shard-size",
        text="Bytes of tensors in an output file: 5B is 5e9; K, M or B. 0: one file.",
        metavar="SIZE",
    ),
]
CopyTokenizer = Annotated[bool, same("--copy-tokenizer/--no-copy-tokenizer", text="Copy the tokenizer of the base.")]
WriteCard = Annotated[
    bool, same("--write-model-card/--no-write-model-card", text="Write README.md and mergekit_config.yml.")
]
RandomSeed = Annotated[int | None, same("--random-seed", text="Of dare and della. Default: 0.", min=0)]
Cache = Annotated[
    str | None, same("--transformers-cache", text="Cache of the Hub in which model names are looked up.", metavar="DIR")
]
Truncate = Annotated[
    bool,
    same(
        "--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings",
        text="Cut vocabularies to the smallest, as `relax: {vocabulary: truncate}`.",
    ),
]
Safe = Annotated[
    bool,
    same(
        "--safe-serialization/--no-safe-serialization", text="Safetensors; pickles are never written: --no- is refused."
    ),
]
Quiet = Annotated[bool, same("--quiet/--no-quiet", text="No progress bar, no closing lines.")]
Crimes = Annotated[bool, idle_flag("allow_crimes")]
Trust = Annotated[bool, idle_flag("trust_remote_code")]
LoraCache = Annotated[str | None, idle("lora_merge_cache", metavar="DIR")]
LoraDtype = Annotated[str | None, idle("lora_merge_dtype", metavar="DTYPE")]
LowMemory = Annotated[bool, idle_flag("low_cpu_memory")]
Unpickle = Annotated[bool, idle_flag("lazy_unpickle")]
ReadToGpu = Annotated[bool, idle_flag("read_to_gpu")]
MultiGpu = Annotated[bool, same("--multi-gpu/--no-multi-gpu", text="Merge on all GPUs, as --device auto.")]
AsyncWrite = Annotated[bool, idle_flag("async_write")]
WriteThreads = Annotated[int, idle("write_threads", show_default=False)]
Clone = Annotated[bool, idle_flag("clone_tensors")]
Verbosity = Annotated[int, idle("verbosity", "-v", count=True, show_default=False)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace whatever model the folder holds.", rich_help_panel=OURS)
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Forget an interrupted merge, do not continue it.", rich_help_panel=OURS)
]


def command(function: Any, *lines: str) -> Any:
    """A program with one command; lines: examples of its use."""
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command(epilog=examples(*lines) if lines else None)(function)
    return app


def mergekit_yaml(
    context: typer.Context,
    config: Config,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    cuda: Cuda = False,
    device: Device = None,
    gpu_rich: GpuRich = False,
    num_threads: NumThreads = None,
    out_shard_size: ShardSize = "5B",
    copy_tokenizer: CopyTokenizer = True,
    write_model_card: WriteCard = True,
    safe_serialization: Safe = True,
    random_seed: RandomSeed = None,
    transformers_cache: Cache = None,
    unsafe_truncate_embeddings: Truncate = False,
    quiet: Quiet = False,
    memory: Memory = None,
    allow_pickle: AllowPickle = False,
    prefer: Prefer = None,
    download: Download = False,
    overwrite: Overwrite = False,
    restart: Restart = False,
    debug: Debug = False,
    allow_crimes: Crimes = False,
    trust_remote_code: Trust = False,
    lora_merge_cache: LoraCache = None,
    lora_merge_dtype: LoraDtype = None,
    lazy_unpickle: Unpickle = False,
    low_cpu_memory: LowMemory = False,
    read_to_gpu: ReadToGpu = False,
    multi_gpu: MultiGpu = False,
    async_write: AsyncWrite = False,
    write_threads: WriteThreads = 1,
    clone_tensors: Clone = False,
    verbosity: Verbosity = 0,
) -> None:
    """Merge as mergekit-yaml does: its YAML files and its flags.

    Keys that nothing knows are ignored with a warning. A folder OUT that holds the output of a merge, and nothing
    else, is replaced when the new model is complete.
    """
    with reported_errors(debug):
        from pymerge import hub
        from pymerge.integrations.mergekit_yaml import config_of, merge, recipe_of

        options = options_of(context.params)
        raw, text = config_of(config)
        with hub.access(options.transformers_cache, download=options.download):
            recipe, remarks = recipe_of(raw, str(config), options)
            warn(remarks)
            options = replace(options, memory=budget(memory, recipe, options.devices))
            summary = merge(recipe, text, out, options)
        if not quiet:
            print_result(out, summary, said=remarks)


def mergekit_multi(
    context: typer.Context,
    config: Config,
    intermediate_dir: Annotated[
        Path, typer.Option("--intermediate-dir", "-I", help="Folder for the merges that have names.")
    ],
    out_path: Annotated[Path | None, typer.Option(help="Folder for the merge without a name.")] = None,
    lazy: Annotated[
        bool, typer.Option("--lazy/--no-lazy", help="Skip merges that are finished, of this recipe and these inputs.")
    ] = True,
    cuda: Cuda = False,
    device: Device = None,
    gpu_rich: GpuRich = False,
    num_threads: NumThreads = None,
    out_shard_size: ShardSize = "5B",
    copy_tokenizer: CopyTokenizer = True,
    write_model_card: WriteCard = True,
    safe_serialization: Safe = True,
    random_seed: RandomSeed = None,
    transformers_cache: Cache = None,
    unsafe_truncate_embeddings: Truncate = False,
    quiet: Quiet = False,
    memory: Memory = None,
    allow_pickle: AllowPickle = False,
    prefer: Prefer = None,
    download: Download = False,
    overwrite: Overwrite = False,
    restart: Restart = False,
    debug: Debug = False,
    allow_crimes: Crimes = False,
    trust_remote_code: Trust = False,
    lora_merge_cache: LoraCache = None,
    lora_merge_dtype: LoraDtype = None,
    lazy_unpickle: Unpickle = False,
    low_cpu_memory: LowMemory = False,
    read_to_gpu: ReadToGpu = False,
    multi_gpu: MultiGpu = False,
    async_write: AsyncWrite = False,
    write_threads: WriteThreads = 1,
    clone_tensors: Clone = False,
    verbosity: Verbosity = 0,
) -> None:
    """Run the merges of CONFIG, several YAML documents, in the order in which they need each other.

    A document with a `name` is merged into a folder of that name, which others may name as a model. All are planned
    before the first runs; what an interrupted run finished is not done again.
    """
    with reported_errors(debug):
        from pymerge.integrations.mergekit_multi import read_documents, run

        options = options_of(context.params)
        options = replace(options, memory=budget(memory, device=options.devices))
        documents = read_documents(config, intermediate_dir, out_path)
        for document, summary in run(documents, options, lazy=lazy, warn=warn):
            if not quiet and summary is None:
                print(f"{document.out}: finished before, skipped")
            elif not quiet and summary is not None:
                print_result(document.out, summary)


def options_of(given: Mapping[str, Any]) -> MergekitOptions:
    """The options among the arguments of a command, all but the memory."""
    known = {name: given[name] for name in given if name in MergekitOptions.__dataclass_fields__}
    return MergekitOptions.of(known | {"memory": None})


def warn(remarks: list[str]) -> None:
    for remark in remarks:
        print(f"warning: {remark}", file=sys.stderr)


def yaml_main() -> None:
    """Entry point of the `pymerge-yaml` command."""
    command(mergekit_yaml, "pymerge-yaml recipe.yml merged/ --out-shard-size 2B")()


def multi_main() -> None:
    """Entry point of the `pymerge-multi` command."""
    command(mergekit_multi, "pymerge-multi recipes.yml -I stages/ --out-path merged/")()
