"""Is a merged model on disk what was written, does it fit its config, and is it what a recipe makes?"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge import _C
from pymerge.checkpoint import ITEMSIZE, AnyTensor, Checkpoint, open_checkpoint, safe_name
from pymerge.checkpoint.header import name_list
from pymerge.checkpoint.index import read_json_object
from pymerge.checkpoint.journal import differences, normal_form
from pymerge.checkpoint.tied import TEXT_CONFIGS, input_embedding, tie_setting, tied_pairs
from pymerge.engine.arena import Arena
from pymerge.engine.check import FLOATS
from pymerge.engine.layer_config import own_layers
from pymerge.engine.progress import make_progress
from pymerge.errors import CorruptFile, InputError
from pymerge.recipe.stacks import COUNT, LayerName

if TYPE_CHECKING:
    from pymerge.engine.plan import Options
    from pymerge.recipe import Recipe

CHUNK = 8 << 20  # bytes read at a time
MAX_SUMMARY = 1_000_000_000  # bytes of merge.json
# ALBERT's groups come first: all its layers run with their weights.
LAYER_COUNTS = ("num_hidden_groups", *COUNT)
LOADERS = {  # by the file that says what to load
    "model_index.json": ("diffusers", "DiffusionPipeline"),
    "modules.json": ("sentence_transformers", "SentenceTransformer"),
}


def verify(
    folder: str | Path,
    *,
    load: bool = False,
    against: Recipe | str | Path | None = None,
    options: Options | None = None,
) -> dict[str, Any]:
    """Reads every tensor of a merged model, and what the method left beside them, again and compares with merge.json;
    compares the weights with config.json: tied matrices, vocabulary, number of layers.

    load     also load the model: with transformers by names and shapes, without the memory of its weights; pipelines
             and sentence encoders whole, on the CPU, with diffusers or sentence-transformers
    against  a recipe (or its YAML file): the model must be of it, of its inputs as they are now, and have the names,
             shapes and dtypes that a merge would write
    options  how that recipe's models are opened: allow_pickle, prefer; progress
    Returns  {"tensors", "bytes"}
    Raises   CorruptFile naming every tensor that is not what was written, holds NaN or Inf, or does not fit the config;
             InputError: not made by pymerge, or not by that recipe."""
    folder, progress = Path(folder), None if options is None else options.progress
    path = folder / "merge.json"
    if not path.is_file():
        raise InputError(f"{folder}: no merge.json here: only models that pymerge wrote can be verified")
    summary = read_json_object(path, MAX_SUMMARY)
    if "checksums" not in summary:
        raise InputError(f"{folder}: merge.json has no checksums: only whole models can be verified, no adapters")
    wanted: dict[str, str] = summary["checksums"]
    finite = summary["relaxations"].get("nonfinite") != "keep"
    arena, problems, total, found = Arena(CHUNK), [], 0, {}
    block = arena.take(CHUNK)
    with open_checkpoint(folder) as checkpoint:
        if against is not None:
            compare_with_recipe(folder, against, summary, checkpoint, options)
        problems += [f"{safe_name(name)}: missing" for name in wanted if name not in checkpoint]
        problems += [f"{safe_name(name)}: not in merge.json" for name in checkpoint if name not in wanted]
        size = sum(tensor.nbytes for tensor in checkpoint.values())
        with make_progress(size, progress, len(checkpoint)) as shown:
            for name, tensor in checkpoint.items():
                found[name], bad = scan(tensor, block.view, block.address)
                total += tensor.nbytes
                shown.advance(tensor.nbytes, name)
                if name in wanted and f"{found[name]:08x}" != wanted[name]:
                    problems.append(f"{safe_name(name)}: checksum {found[name]:08x}, written was {wanted[name]}")
                elif bad and finite:
                    problems.append(f"{safe_name(name)}: {bad} NaN or Inf")
        problems += config_problems(checkpoint, found)
        count = len(checkpoint)
    for name, crc in summary.get("side_checksums", {}).items():
        size, problem = scan_file(folder / name, crc, block.view, block.address)
        total += size
        problems += [f"{name}: {problem}"] if problem else []
    if problems:
        raise CorruptFile(f"{folder}: {len(problems)} problem(s):\n" + "\n".join(problems[:20]))
    if load:
        load_with_its_library(folder)
    return {"tensors": count, "bytes": total}


def config_problems(model: Checkpoint, checksums: Mapping[str, int]) -> list[str]:
    """Where weights and config.json disagree: tied matrices that differ, rows of the vocabulary, number of layers."""
    problems = []
    if tie_setting(model.config):
        for name, source in tied_pairs(model).items():
            if name in model and checksums[name] != checksums[source]:
                problems.append(f"{safe_name(name)}: config.json ties it to {safe_name(source)}, their values differ")
    config = model.config or {}
    text = next((config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), config)
    embedding, rows = input_embedding(model), text.get("vocab_size")
    if embedding is not None and isinstance(rows, int) and model[embedding].shape[0] != rows:
        problems.append(f"{safe_name(embedding)}: {model[embedding].shape[0]} rows, config.json says vocab_size {rows}")
    stacks: dict[str, set[int]] = {}
    for name in model:
        if (layer := LayerName.of(name)) is not None:
            stacks.setdefault(layer.stack, set()).add(layer.number)
    layers = next((text[key] for key in LAYER_COUNTS if isinstance(text.get(key), int)), None)
    if layers is not None and len(stacks) == 1:
        ((stack, numbers),) = stacks.items()
        stored = max(numbers) + 1
        if len(numbers) != stored or own_layers(config, stored) != layers:
            problems.append(f"{safe_name(stack)}: {len(numbers)} layers, config.json says {layers}")
    return problems


def compare_with_recipe(
    folder: Path,
    against: Recipe | str | Path,
    summary: Mapping[str, Any],
    model: Checkpoint,
    options: Options | None,
) -> None:
    """Raises InputError with every difference between a merged model and what a recipe makes of its inputs now."""
    from pymerge.engine.local import opened_plan
    from pymerge.engine.plan import Options
    from pymerge.recipe import Recipe

    recipe = against if isinstance(against, Recipe) else Recipe.from_yaml(against)
    with opened_plan(recipe, options or Options()) as (inputs, plan):
        fingerprints = [checkpoint.fingerprint() for checkpoint in inputs.all]
    asked = normal_form({"recipe": recipe.to_dict(), "inputs": fingerprints})
    problems = differences({key: summary[key] for key in asked}, asked)
    entries = {item.entry.name: item.entry for item in plan.items}
    for name, entry in entries.items():
        if name not in model:
            problems.append(f"{safe_name(name)}: missing")
        elif (model[name].dtype, model[name].shape) != (entry.dtype, entry.shape):
            held, made = (f"{t.dtype} {list(t.shape)}" for t in (model[name], entry))
            problems.append(f"{safe_name(name)}: {held}, the recipe makes {made}")
    problems += [f"{safe_name(name)}: not of this recipe" for name in model if name not in entries]
    if problems:
        raise InputError(f"{folder}: not what this recipe makes:\n" + "\n".join(problems[:20]))


def scan(tensor: AnyTensor, view: memoryview, address: int) -> tuple[int, int]:
    """(checksum, number of NaN and Inf) of a tensor, read in chunks."""
    crc = bad = 0
    for start in range(0, tensor.nbytes, CHUNK):
        size = min(CHUNK, tensor.nbytes - start)
        tensor.read_into(view[:size], start)
        crc = _C.crc32c((address, size), crc)
        if tensor.dtype in FLOATS:
            bad += _C.count_nonfinite((address, tensor.dtype), size // ITEMSIZE[tensor.dtype])[0]
    return crc, bad


def scan_file(path: Path, wanted: str, view: memoryview, address: int) -> tuple[int, str]:
    """(bytes, what is wrong with it) of a file beside the weights, read in chunks."""
    if not path.is_file():
        return 0, "missing"
    crc = total = 0
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(view):
            crc, total = _C.crc32c((address, size), crc), total + size
    return total, "" if f"{crc:08x}" == wanted else f"checksum {crc:08x}, written was {wanted}"


def load_with_its_library(folder: Path) -> None:
    """Raises CorruptFile where the library that a model is of does not load it; InputError where there is none."""
    library, name = loader_of(folder)
    try:
        module = import_module(library)
    except ImportError as error:
        raise InputError(f"loading needs {library}: pip install {library.replace('_', '-')}") from error
    try:
        if name == "SentenceTransformer":
            module.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        elif name:
            load_model = getattr(getattr(module, name, None), "from_pretrained", None)
            if load_model is None:
                raise CorruptFile(f"{folder}: {library} has no model class {safe_name(name)}")
            load_model(str(folder), local_files_only=True)
        else:
            load_with_transformers(folder, module)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise CorruptFile(f"{folder}: {library} does not load it: {error}") from error


def loader_of(folder: Path) -> tuple[str, str]:
    """(library, class) that loads a folder; no class: transformers chooses one."""
    for file, found in LOADERS.items():
        if (folder / file).exists():
            return found
    config = folder / "config.json"
    name = read_json_object(config, MAX_SUMMARY).get("_class_name") if config.is_file() else None
    return ("diffusers", name) if isinstance(name, str) else ("transformers", "")  # a component of a pipeline


def load_with_transformers(folder: Path, transformers: Any) -> None:
    """Nothing is read but headers: the model is on the meta device, for which transformers needs accelerate."""
    if find_spec("accelerate") is None:
        raise InputError("loading needs accelerate: pip install accelerate")
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        names = getattr(config, "architectures", None) or ["AutoModel"]
        cls = getattr(transformers, names[0], transformers.AutoModel)
        options = {"local_files_only": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        _, report = cls.from_pretrained(folder, config=config, device_map="meta", **options)
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
    odd = {
        "lacks": sorted(report["missing_keys"]),
        "has in another shape": sorted(k for k, *_ in report["mismatched_keys"]),
    }
    if any(odd.values()):
        said = "; ".join(f"{what} {name_list(names)}" for what, names in odd.items() if names)
        raise CorruptFile(f"{folder}: as a {cls.__name__} of its config.json it {said}")
