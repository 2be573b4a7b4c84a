"""mergekit's options under mergekit's names, and what pymerge does for each."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from pymerge.errors import RecipeError

if TYPE_CHECKING:
    from pymerge.engine.plan import Options

# Accepted, no effect, because:
NO_EFFECT: Final = {
    "allow_crimes": "models are merged by the names and shapes of their tensors, whatever the architecture",
    "low_cpu_memory": "memory is bounded by --memory",
    "read_to_gpu": "tensors reach the device in bounded pieces",
    "clone_tensors": "every tensor of the output is written by itself",
    "async_write": "reading, merging and writing overlap always",
    "write_threads": "reading, merging and writing overlap always",
    "lora_merge_cache": "adapters are merged where their weights are read",
    "lora_merge_dtype": "adapters are applied in float32, rounded once at the end",
    "lazy_unpickle": "pickled weights are read lazily, and only with --allow-pickle",
    "trust_remote_code": "code that comes with a model is never run",
    "verbosity": "everything is said once, and kept in merge.json",
}
SAID: Final = ("lazy_unpickle", "trust_remote_code")  # of these, those whose giving is answered with a line
UNITS: Final = {"": 1, "K": 1000, "M": 1000**2, "B": 1000**3}
ONE_FILE: Final = sys.maxsize // 2


@dataclass(frozen=True, kw_only=True)
class MergekitOptions:
    """The options of mergekit 0.1.5, then those of pymerge that go with them.

    memory        bytes for the merge
    allow_pickle  read pytorch_model*.bin too
    prefer        which weights to read where a folder holds two sets
    overwrite     replace the output folder, whatever model it holds
    restart       forget an interrupted merge into that folder
    download      fetch models that are named and not in the Hub's cache
    engine        options for the merge itself, in place of all that mergekit has for it
    """

    allow_crimes: bool = False
    unsafe_truncate_embeddings: bool = False
    transformers_cache: str | None = None
    lora_merge_cache: str | None = None
    lora_merge_dtype: str | None = None
    cuda: bool = False
    device: str | None = None
    low_cpu_memory: bool = False
    out_shard_size: int = 5_000_000_000
    copy_tokenizer: bool = True
    clone_tensors: bool = False
    trust_remote_code: bool = False
    random_seed: int | None = None
    lazy_unpickle: bool = False
    write_model_card: bool = True
    safe_serialization: bool = True
    verbosity: int = 0
    quiet: bool = False
    read_to_gpu: bool = False
    multi_gpu: bool = False
    num_threads: int | None = None
    gpu_rich: bool = False
    async_write: bool = False
    write_threads: int = 1
    memory: int | None = None
    allow_pickle: bool = False
    prefer: Literal["single", "sharded"] | None = None
    overwrite: bool = False
    restart: bool = False
    download: bool = False
    engine: Options | None = None

    def __post_init__(self) -> None:
        if not self.safe_serialization:
            raise RecipeError("--no-safe-serialization: pymerge writes no pickled weights, only safetensors")

    @classmethod
    def of(cls, given: Any) -> Self:
        """From options of pymerge, a mapping of names, or an object with attributes of mergekit's names.

        Raises   RecipeError: an unknown name in a mapping, an object without any."""
        from pymerge.engine.plan import Options
        from pymerge.methods.names import nearest

        if given is None:
            return cls()
        if isinstance(given, cls):
            return given
        if isinstance(given, Options):
            return cls(engine=given)
        names = [f.name for f in fields(cls)]
        if not isinstance(given, Mapping):
            given = {name: getattr(given, name) for name in names if hasattr(given, name)}
            if not given:
                raise RecipeError("options: has none of mergekit's option names")
        unknown = [name for name in given if name not in names]
        if unknown:
            raise RecipeError(f"options: unknown option {unknown[0]!r}: {nearest(unknown[0], names)}")
        values: dict[str, Any] = dict(given)
        if isinstance(size := values.get("out_shard_size"), str):
            values["out_shard_size"] = parse_size(size)
        return cls(**values)

    def for_merge(self, *, overwrite: bool) -> Options:
        """As the engine takes them. overwrite: whether the output folder may be replaced."""
        from pymerge.engine.plan import Options

        if self.engine is not None:
            return replace(self.engine, overwrite=overwrite)
        return Options(
            memory=self.memory,
            threads=self.num_threads,
            device=self.devices,
            shard_bytes=self.out_shard_size if self.out_shard_size > 0 else ONE_FILE,
            overwrite=overwrite,
            resume=not self.restart,
            allow_pickle=self.allow_pickle,
            prefer=self.prefer,
            progress=False if self.quiet else None,
        )

    @property
    def devices(self) -> str:
        return self.device or ("auto" if self.multi_gpu else "cuda" if self.cuda or self.gpu_rich else "cpu")

    def remarks(self) -> list[str]:
        """What was asked for and is not done, where that matters."""
        return [f"--{name.replace('_', '-')} has no effect: {NO_EFFECT[name]}" for name in SAID if getattr(self, name)]


def parse_size(text: str) -> int:
    """mergekit's `5B`, `500M`, `800K`, `1000` in bytes; 0: everything in one file."""
    match = re.fullmatch(r"([0-9]+)([KMB]?)", text.strip().upper())
    if match is None:
        raise RecipeError(f"{text!r} is no size as mergekit writes it: 5B (5e9 bytes), 500M, 800K, or a number")
    return int(match[1]) * UNITS[match[2]]
