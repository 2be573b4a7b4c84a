"""Everything beside the weights: what a loader needs to use the merged model as it used the base.

Copied by name from the base's folder: configs (dtype fields follow the output), tokenizer, chat template, processors,
licence; likewise of each component of a pipeline or a sentence-transformers model. Never copied: code, old weights and
indices, optimizer states, READMEs; what is left is listed.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.checkpoint.components import component_folders
from pymerge.checkpoint.header import TORCH_NAME, name_list, safe_name
from pymerge.checkpoint.index import read_json_object
from pymerge.checkpoint.read import MAX_CONFIG, Checkpoint

TOKENIZER = """
    tokenizer.json tokenizer_config.json tokenizer.model tokenizer.model.v* tekken.json added_tokens.json
    special_tokens_map.json vocab*.json vocab*.txt vocab.bpe encoder.json merges.txt bpe.codes *.spm *.tiktoken
    spiece.model sentencepiece*.model normalizer.json entity_vocab.json emoji.txt dict.txt chat_template.jinja
""".split()
COPIED = (
    """
    generation_config.json chat_template.json
    *preprocessor_config.json *processor_config.json
    modules.json sentence_bert_config.json config_sentence_transformers.json model_index.json
    LICENSE* LICENCE* NOTICE* USE_POLICY*
""".split()
    + TOKENIZER
)
_DTYPE_KEYS = ("torch_dtype", "dtype")
_FLOATS = frozenset(name for name in TORCH_NAME.values() if "float" in name)
_OF_COMPONENTS = (*COPIED, "*.json", "*.txt", "*.jinja")


@dataclass(frozen=True)
class SideFiles:
    """Files to copy (path below the base's folder, the same below the output) and what a reader of the summary should
    know."""

    folder: Path | None
    files: tuple[str, ...]
    notes: tuple[str, ...]


def plan_side_files(base: Checkpoint) -> SideFiles:
    """What would be copied; refuses early what could not be.

    Raises   UnsafePath, UnsafeFile, CorruptFile, InputError for side files that are damaged or point out of the
             folder."""
    folder = base.folder
    if folder is None:
        return SideFiles(None, (), ("no config or tokenizer: the base is not a model folder",))
    present = sorted(os.listdir(folder))
    files = [n for n in present if any(fnmatch.fnmatchcase(n, p) for p in COPIED) and (folder / n).is_file()]
    files += _below(folder, "additional_chat_templates", ("*.jinja",))
    notes = [*_remote_code_notes(base, folder, present)]
    components = {name: at for name, at in component_folders(folder).items() if name}
    for name, at in components.items():
        files += [f"{name}/{file}" for file in _component_files(at)]
    here = [*present, *(f"{name}/{n}" for name, at in components.items() for n in sorted(os.listdir(at)))]
    used = {*files, *(name.split("/")[0] for name in files), "config.json", *components}
    used |= {os.path.dirname(name) for name in components} | {base.name_of(f.path) for f in base.files}
    left = [n for n in here if n not in used]
    if left:
        notes.append(f"not copied from the base: {name_list(left, 40)}")
    if base.config is not None:
        files.insert(0, "config.json")
    return SideFiles(folder, tuple(files), tuple(notes))


def copy_side_files(
    base: Checkpoint,
    staging: Path,
    *,
    out_dtype: str | None = None,
    config_changes: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),
) -> dict[str, list[str]]:
    """Copy the side files of `base` into `staging`.

    out_dtype   safetensors code of the output's dtype, for the dtype fields of config.json; None: as the base
    config_changes  what config.json says otherwise, on top of what `base` knows of itself: dotted key -> value, None
                    removes it
    without     patterns of names that are left out: the merged model has files of its own
    Returns     {"copied": names, "notes": lines for the summary}
    Raises      as plan_side_files; OSError where writing fails."""
    plan = plan_side_files(base)
    files = [name for name in plan.files if not any(fnmatch.fnmatchcase(name, p) for p in without)]
    changes = {**base.config_changes, **(config_changes or {})}
    for name in files:
        target = staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == "config.json" and base.config is not None and (changes or out_dtype is not None):
            config = with_changes(base.config, changes)
            _write_json(target, with_dtype(config, TORCH_NAME[out_dtype]) if out_dtype is not None else config)
        elif plan.folder is None:
            continue
        elif name.endswith("/config.json") and os.path.dirname(name) in base.components and out_dtype is not None:
            config = read_json_object(plan.folder / name, MAX_CONFIG)
            _write_json(target, _replace_dtype(config, TORCH_NAME[out_dtype]))
        else:  # content only: a link becomes a file, permissions follow the umask
            shutil.copyfile(plan.folder / name, target)
    return {"copied": files, "notes": list(plan.notes)}


def _write_json(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def with_changes(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The config with other values: dotted key -> value, None removes it."""
    changed = dict(config)
    for key, value in changes.items():
        first, _, rest = key.partition(".")
        if rest:
            changed[first] = with_changes(changed.get(first) or {}, {rest: value})
        elif value is None:
            changed.pop(first, None)
        else:
            changed[first] = value
    return changed


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with every dtype field set to `dtype` ("bfloat16"), those of the text, vision, ... configs inside it
    too.

    A config without any gets `torch_dtype`, the field that all versions of transformers read."""
    changed = _replace_dtype(config, dtype)
    if not any(key in changed for key in (*_DTYPE_KEYS, "_class_name")):  # diffusers keeps no dtype
        changed["torch_dtype"] = dtype
    return changed


def _replace_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key in _DTYPE_KEYS and (
            value is None or (isinstance(value, str) and value.removeprefix("torch.") in _FLOATS)
        ):
            result[key] = dtype
        elif isinstance(value, dict) and key != "quantization_config":
            result[key] = _replace_dtype(value, dtype)
        else:
            result[key] = value
    return result


def _remote_code_notes(base: Checkpoint, folder: Path, present: list[str]) -> list[str]:
    """Code that the configs name is neither run nor copied, and the summary says so."""
    notes = []
    code = [n for n in present if n.endswith(".py")]
    if code:
        notes.append(f"code in the base's folder was neither run nor copied: {name_list(code, 40)}")
    for name in ("config.json", "tokenizer_config.json", "adapter_config.json"):
        if name in present:
            config = (
                base.config if name == "config.json" and base.config else read_json_object(folder / name, MAX_CONFIG)
            )
            if config.get("auto_map"):
                notes.append(
                    f"{name} asks for code of its own (auto_map: {_auto_map(config['auto_map'])}); the merged model "
                    "keeps the entry, "
                    "whoever loads it must bring and trust that code"
                )
    return notes


def _auto_map(value: Any) -> str:
    if isinstance(value, dict):
        return name_list([f"{key} -> {target}" for key, target in value.items()])
    return safe_name(str(value))


def _component_files(folder: Path) -> list[str]:
    """What is copied of a component's folder: all configs, tokenizer files and the like, no weights."""
    names = [n for n in sorted(os.listdir(folder)) if any(fnmatch.fnmatchcase(n, p) for p in _OF_COMPONENTS)]
    return [n for n in names if (folder / n).is_file() and ".index." not in n]


def _below(folder: Path, name: str, patterns: tuple[str, ...]) -> list[str]:
    """Files in a folder of the model and its sub-folders, as relative names with slashes."""
    found = []
    for parent, _, files in os.walk(folder / name):
        for file in files:
            if any(fnmatch.fnmatchcase(file, p) for p in patterns) and os.path.isfile(os.path.join(parent, file)):
                found.append(os.path.relpath(os.path.join(parent, file), folder).replace(os.sep, "/"))
    return sorted(found)
