"""A PEFT adapter folder as a model: its base's tensors, with scale * B A on those that it adapts.

What the adapter does is known from its config and headers; what pymerge does not know is refused before anything is
read. Format: huggingface/peft, docs/source/developer_guides/checkpoint.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge import hub
from pymerge.checkpoint.adapted import AdaptedTensor
from pymerge.checkpoint.header import name_list, safe_name
from pymerge.checkpoint.index import read_json_object
from pymerge.checkpoint.read import AnyTensor, Checkpoint, open_checkpoint
from pymerge.checkpoint.tied import feeds_head
from pymerge.errors import CorruptFile, InputError, ShapeMismatch
from pymerge.remote.mirror import is_remote, shown

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json")
MAX_CONFIG = 16_000_000
MAX_PATTERN = 2000  # characters of a regular expression over module names
REPEATED_GROUP, REPETITION = re.compile(r"\)[*+?{]"), re.compile(r"[*+{]")
PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?$")
# Settings under which an adapter is more than s B A on the weights of its base. Absent, null, false and empty are fine.
NOT_LORA = {
    "use_dora": "DoRA rescales the columns of the whole weight",
    "lora_bias": "its factors have biases",
    "use_qalora": "QA-LoRA pools the inputs",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only",
    "arrow_config": "Arrow routes tokens between adapters",
    "use_bdlora": "block-diagonal factors",
    "layer_replication": "its layers are repeated",
    "megatron_config": "Megatron's layers",
    "target_parameters": "it adapts parameters of fused experts",
    "trainable_token_indices": "single rows of the embeddings are trained",
}
INITIAL = (True, False, None, "gaussian", "orthogonal", "eva")  # the base stays as it is; PiSSA and others change it


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a PEFT adapter and no whole model."""
    where = Path(path)
    return (where / CONFIG).is_file() and not any((where / name).exists() for name in MODEL_FILES)


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says, checked."""

    folder: Path
    raw: Mapping[str, Any]
    digest: str

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """Raises InputError where the adapter is of a kind that is not s B A; CorruptFile."""
        path = folder / CONFIG
        raw = read_json_object(path, MAX_CONFIG)
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise InputError(f"{_shown(path)}: peft_type {kind!r}: pymerge reads LORA adapters")
        problems = [f"{key} is set: {why}" for key, why in NOT_LORA.items() if raw.get(key)]
        if raw.get("bias") not in (None, "none"):
            problems.append(f"bias is {raw['bias']!r}: the biases are trained too; pymerge reads bias 'none'")
        if raw.get("init_lora_weights") not in INITIAL:
            problems.append(
                f"init_lora_weights is {raw['init_lora_weights']!r}, which may have changed the base: save the adapter "
                "with path_initial_model_for_weight_conversion, which turns it into a plain one"
            )
        if problems:
            raise InputError(f"{_shown(path)}: {'; '.join(problems)}. Merge it into its base with PEFT first")
        text = json.dumps(raw, sort_keys=True).encode("utf-8", "surrogatepass")
        config = cls(folder, raw, hashlib.blake2b(text, digest_size=16).hexdigest())
        config.number("lora_alpha", raw.get("lora_alpha", 8))
        config.number("r", raw.get("r", 8))
        return config

    def number(self, key: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e9:
            raise CorruptFile(f"{_shown(self.folder / CONFIG)}: {key} must be a number, found {value!r}")
        return value

    def of_module(self, key: str, pattern_key: str, default: Any, module: str) -> float:
        """A number for this module: by the first pattern that its name ends with, else the default."""
        patterns = self.raw.get(pattern_key) or {}
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            self.check_pattern(pattern_key, pattern)
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return self.number(f"{pattern_key}[{pattern!r}]", value)
            except re.error as e:
                raise CorruptFile(f"{_shown(self.folder / CONFIG)}: {pattern_key}: {pattern!r}: {e}") from None
        return self.number(key, self.raw.get(key, default))

    def check_pattern(self, key: str, pattern: str) -> None:
        """Refuses a stranger's regular expression whose matching could take longer than a name is long, cubed."""
        if len(pattern) > MAX_PATTERN or REPEATED_GROUP.search(pattern) or len(REPETITION.findall(pattern)) > 3:
            raise CorruptFile(
                f"{_shown(self.folder / CONFIG)}: {key}: {safe_name(pattern)}: at most 3 repetitions (*, +, {{}}), "
                f"none of a group, and {MAX_PATTERN} characters: write the names of the modules"
            )

    def rank(self, module: str) -> int:
        rank = self.of_module("r", "rank_pattern", 8, module)
        if rank < 1:
            path = _shown(self.folder / CONFIG)
            raise CorruptFile(f"{path}: r of {safe_name(module)} must be at least 1, found {rank}")
        return int(rank)

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) of rank-stabilised LoRA."""
        rank = self.rank(module)
        return self.of_module("lora_alpha", "alpha_pattern", 8, module) / (
            rank**0.5 if self.raw.get("use_rslora") else rank
        )


class AdapterCheckpoint(Checkpoint):
    """The base's tensors under an adapter; those that the adapter saved whole in place of the base's."""

    def __init__(self, config: AdapterConfig, base: Checkpoint, adapter: Checkpoint, own: bool) -> None:
        tensors, self._shift = _tensors(config, base, adapter)
        super().__init__(config.folder, base.folder, tensors, [*base.files, *adapter.files], pickled=base.pickled)
        self.notes, self.config_changes = base.notes, base.config_changes
        self.adapter_config = config
        self.base = base
        self._closed_with_this = [adapter, *([base] if own else [])]

    def name_in_adapter(self, name: str) -> str:
        """A name of the base as the adapter spells it."""
        drop, add = self._shift
        return f"{drop}{name.removeprefix(add)}"

    def fingerprint(self) -> dict[str, Any]:
        path, config = self.adapter_config.folder, self.adapter_config.digest
        where = shown(path) if is_remote(path) else os.path.realpath(path)
        return super().fingerprint() | {"path": where, "adapter_config": config}

    def close(self) -> None:
        for checkpoint in self._closed_with_this:
            checkpoint.close()


def base_of_adapter(folder: str | os.PathLike[str]) -> str:
    """The local folder of the base that the adapter names, a path or a name on the Hub; InputError where it names none
    or one that is not here."""
    config = AdapterConfig.read(Path(folder))
    named, revision = config.raw.get("base_model_name_or_path"), config.raw.get("revision")
    text = f"{_shown(Path(folder))}: an adapter whose base, {safe_name(str(named), 400)!r}"
    if not isinstance(named, str) or not (os.path.exists(named) or hub.is_name(named)):
        raise InputError(f"{text}, is no folder here: give the base, as base_model or as `base+adapter`")
    if os.path.exists(named):
        return named
    try:
        return hub.snapshot(named, revision if isinstance(revision, str) else None)
    except InputError as e:
        raise InputError(f"{text}: {e}; or give the base, as base_model or as `base+adapter`") from e


def open_adapter(
    folder: str | os.PathLike[str],
    base: Checkpoint | str | os.PathLike[str] | None = None,
    *,
    allow_pickle: bool = False,
) -> AdapterCheckpoint:
    """The model that an adapter makes of its base (opened, which stays the caller's to close, or a path; None: the base
    that the adapter names).

    Raises   InputError (kinds of adapters that are not s B A, tensors that do not belong to one, no base),
             ShapeMismatch, CorruptFile."""
    where = Path(folder)
    config = AdapterConfig.read(where)
    own = not isinstance(base, Checkpoint)
    if not isinstance(base, Checkpoint):
        base = open_checkpoint(base_of_adapter(where) if base is None else base, allow_pickle=allow_pickle)
    weights = next((where / name for name in WEIGHTS if (where / name).exists()), None)
    if weights is None:
        raise InputError(f"{_shown(where)}: an adapter without {WEIGHTS[0]}")
    adapter = open_checkpoint(weights, allow_pickle=allow_pickle)
    try:
        return AdapterCheckpoint(config, base, adapter, own)
    except Exception:
        adapter.close()
        raise


def _tensors(
    config: AdapterConfig, base: Checkpoint, adapter: Checkpoint
) -> tuple[dict[str, AnyTensor], tuple[str, str]]:
    pairs, saved, unknown = _sorted(adapter)
    where = _shown(config.folder)
    if unknown:
        raise InputError(f"{where}: tensors that are no LoRA factors of linear layers: {name_list(unknown)}")
    drop, add = _renaming([*(f"{m}.weight" for m in pairs)], base, where)
    tensors: dict[str, AnyTensor] = {name: base[name] for name in base.file_order()}
    for module, sides in pairs.items():
        name = f"{add}{module.removeprefix(drop)}.weight"
        tensors[name] = _adapted(config, module, base[name], sides)
        if sides["embedding"] and feeds_head(base, name):
            raise InputError(
                f"{where}: {safe_name(module)} is tied to the output head, which the adapter leaves as it is: "
                "one weight cannot be both"
            )
    for name, tensor in saved.items():
        tensors[f"{add}{name.removeprefix(drop)}"] = tensor
    return tensors, (drop, add)


def _sorted(adapter: Checkpoint) -> tuple[dict[str, dict[str, Any]], dict[str, AnyTensor], list[str]]:
    """module -> factors; name -> tensor saved whole (modules_to_save); names of what is neither."""
    pairs: dict[str, dict[str, Any]] = {}
    saved: dict[str, AnyTensor] = {}
    unknown = []
    for key in adapter.file_order():
        name = key.removeprefix(PREFIX)
        found = FACTOR.match(name)
        if found and len(adapter[key].shape) == 2:
            sides = pairs.setdefault(found["module"], {"embedding": bool(found["embedding"])})
            sides[found["side"]] = adapter[key]
        elif "lora_" in name:
            unknown.append(safe_name(key))
        else:
            saved[re.sub(r"\.(modules_to_save|base_layer|original_module)(?=\.)", "", name)] = adapter[key]
    unknown += [f"{safe_name(m)}: half a pair" for m, sides in pairs.items() if not {"A", "B"} <= set(sides)]
    return pairs, saved, unknown


def _renaming(names: list[str], base: Checkpoint, where: str) -> tuple[str, str]:
    """The prefix that the adapter's names have more than the base's, and that which they lack: none, or one of them (a
    base saved with, or without, the wrapper that the adapter was trained in)."""

    def shifts() -> Iterator[tuple[str, str]]:
        yield "", ""
        first = names[0] if names else ""
        yield from (("", name.removesuffix(first)) for name in base if name.endswith(f".{first}"))
        yield f"{first.split('.')[0]}.", ""

    for drop, add in shifts():
        moved = [f"{add}{name.removeprefix(drop)}" for name in names]
        if all(name in base for name in moved):
            return drop, add
    absent = [safe_name(name) for name in names if name not in base]
    raise InputError(f"{where}: adapts what the base model lacks: {name_list(absent)}. Is it an adapter of this base?")


def _adapted(config: AdapterConfig, module: str, weight: AnyTensor, sides: Mapping[str, Any]) -> AdaptedTensor:
    a, b = sides["A"], sides["B"]
    transposed = bool(sides["embedding"] or config.raw.get("fan_in_fan_out"))
    fits = (b.shape[0], a.shape[1])
    expected = fits[::-1] if transposed else fits
    where = f"{_shown(config.folder)}: {safe_name(module)}"
    if isinstance(weight, AdaptedTensor):
        raise InputError(f"{where}: an adapter on an adapter")
    if tuple(weight.shape) != expected or a.shape[0] != b.shape[1]:
        hint = " (fan_in_fan_out says how the base stores it)" if tuple(weight.shape) == expected[::-1] else ""
        raise ShapeMismatch(
            f"{where}: factors {list(b.shape)} and {list(a.shape)} for a weight {list(weight.shape)}{hint}"
        )
    if a.shape[0] != config.rank(module):
        raise ShapeMismatch(f"{where}: factors of rank {a.shape[0]}, the config says {config.rank(module)}")
    odd = [t.dtype for t in (weight, a, b) if t.dtype not in ("F64", "F32", "F16", "BF16")]
    if odd:
        raise InputError(f"{where}: {odd[0]} weights or factors: dequantise the base, give factors as floats")
    return AdaptedTensor(weight, a, b, config.scale(module), transposed)


def _shown(path: Path) -> str:
    return safe_name(shown(path), 400)
