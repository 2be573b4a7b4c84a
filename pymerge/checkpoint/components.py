"""Models of several components, each in a folder of its own: diffusers pipelines and sentence-transformers models.

model_index.json or modules.json in the model's folder lists them. A tensor of a component is called COMPONENT/NAME;
what the model's own folder holds keeps its names.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pymerge.checkpoint.header import name_list, safe_name
from pymerge.checkpoint.index import PICKLED, Prefer, Source, check_relative, parse_json_file, read_json_object, resolve
from pymerge.errors import AmbiguousModel, CorruptFile, InputError
from pymerge.remote.mirror import shown

PIPELINE, MODULES = "model_index.json", "modules.json"
STEMS = ("model", "diffusion_pytorch_model")  # of weight files: of transformers, of diffusers
PICKLED_STEMS = {"model": "pytorch_model", "diffusion_pytorch_model": "diffusion_pytorch_model"}
OTHERS = (*PICKLED, ".safetensors", ".onnx", ".msgpack", ".h5", ".pb", ".gguf")  # weights, by the end of a file's name
MAX_LIST = 16_000_000


def declared(folder: Path) -> dict[str, str]:
    """Component -> class, as the folder's list says; "" is the folder itself. Empty where there is no list.

    Raises   CorruptFile, UnsafePath for a list that is damaged or points out of the folder."""
    if (folder / PIPELINE).exists():
        return _of_pipeline(folder / PIPELINE)
    return _of_modules(folder / MODULES) if (folder / MODULES).exists() else {}


def _of_pipeline(path: Path) -> dict[str, str]:
    """Entries are NAME: [library, class]; [null, null] is a component that is left out, other values are settings."""
    found = {}
    for name, value in read_json_object(path, MAX_LIST).items():
        if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
            check_relative(name, shown(path))
            found[name] = ".".join(value)
    return found


def _of_modules(path: Path) -> dict[str, str]:
    modules: Any = parse_json_file(path, MAX_LIST)
    if not isinstance(modules, list) or not all(
        isinstance(m, dict) and all(isinstance(m.get(key, ""), str) for key in ("path", "type")) for m in modules
    ):
        raise CorruptFile(f"{shown(path)}: expected a list of modules with paths")
    found = {}
    for module in modules:
        name = module.get("path", "").rstrip("/")
        name = "" if name == "." else name
        if name:
            check_relative(name, shown(path))
        found[name] = module.get("type", "")
    return found


def component_folders(folder: Path) -> dict[str, Path]:
    """Component -> its folder, of those that are listed and have files, with the folders inside them.

    Raises   InputError for one that is not there."""
    found = {}
    for name, kind in declared(folder).items():
        if (folder / name).is_dir():
            inside = sorted(os.path.relpath(at, folder) for at, _, _ in os.walk(folder / name)) if name else ["."]
            found |= {"" if at == "." else at.replace(os.sep, "/"): folder / at for at in inside}
        elif kind.rsplit(".", 1)[-1] != "Normalize":  # has nothing to keep
            raise InputError(
                f"{shown(folder)}: lists {safe_name(name)} ({kind}), which is not there. Download it again"
            )
    return found


def stems_of(folder: Path) -> dict[str, str]:
    """Component with weights -> stem of its files' names. Empty for a plain model, whose file is model.safetensors."""
    found = {name: stem for name, at in component_folders(folder).items() if (stem := _stem(sorted(os.listdir(at))))}
    if not found and _stem(sorted(os.listdir(folder))) == "diffusion_pytorch_model":
        return {"": "diffusion_pytorch_model"}  # one component of a pipeline, alone
    return {} if found == {"": "model"} else found


def sources(path: Path, *, allow_pickle: bool, prefer: Prefer | None) -> list[tuple[str, Source]]:
    """The weight files of each component of the model at `path`; of a plain model those of "".

    Raises   as `resolve`; InputError for weights of a kind that is not read."""
    stems = stems_of(path) if path.is_dir() else {}
    if not stems:
        return [("", resolve(path, allow_pickle=allow_pickle, prefer=prefer))]
    folders = component_folders(path)
    for component in declared(path):
        inside = [name for name in folders if name == component or (component and name.startswith(f"{component}/"))]
        other = [
            f"{name}/{file}" for name in inside for file in sorted(os.listdir(path / name)) if file.endswith(OTHERS)
        ]
        if other and not any(name in stems for name in inside):
            raise InputError(
                f"{shown(path)}: weights under names that pymerge does not read: {name_list(other)}. It reads "
                f"{' and '.join(f'{stem}.safetensors' for stem in STEMS)}, whole or in shards with an index"
            )
    files = {name: path / name / _weight_file(path / name, prefer) for name in stems}
    return [(name, resolve(file, allow_pickle=allow_pickle, prefer=prefer)) for name, file in files.items()]


def variant_of(file: str) -> str:
    """`fp16` of model.fp16.safetensors and model.safetensors.index.fp16.json; "" of files without one."""
    match = re.fullmatch(r"\w+?(?:\.(\w+))?\.safetensors(?:\.index(?:\.(\w+))?\.json)?", file)
    return (match[1] or match[2] or "") if match else ""


def _stem(files: list[str]) -> str | None:
    """Pickled files count where there are no others."""
    safe = [file for file in files if ".safetensors" in file]
    return next((stem for kind in (safe, files) for stem in STEMS if _choices(kind, stem)), None)


def _choices(files: list[str], stem: str) -> list[str]:
    """Files that a component can be read from: whole, an index of shards, variants of both, pickled ones."""
    pattern = rf"{stem}(\.\w+)?\.safetensors|{stem}\.safetensors\.index(\.\w+)?\.json"
    return [file for file in files if re.fullmatch(rf"{pattern}|{PICKLED_STEMS[stem]}\.bin(\.index\.json)?", file)]


def _weight_file(folder: Path, prefer: Prefer | None) -> str:
    """The one to read: safetensors, without a variant where there is such a file, or of the only variant."""
    here = sorted(os.listdir(folder))
    choices = [file for stem in STEMS for file in _choices(here, stem)]
    safe = [file for file in choices if ".safetensors" in file]
    variants = sorted({variant_of(file) for file in safe})
    if len(variants) > 1 and variants[0]:
        raise AmbiguousModel(
            f"{shown(folder)}: holds the variants {', '.join(variants)} and no weights without one: keep one"
        )
    files = [file for file in safe if variant_of(file) == variants[0]] if safe else choices
    if len(files) > 1 and prefer is None:
        raise AmbiguousModel(
            f"{shown(folder)}: holds {' and '.join(files)}, and one of them is stale. Delete it, or choose: prefer "
            "'single' or 'sharded'"
        )
    return next((file for file in files if file.endswith(".json") == (prefer == "sharded")), files[0])
