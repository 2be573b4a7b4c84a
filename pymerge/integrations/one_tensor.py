"""One tensor of all models merged by any of pymerge's methods that can do without the rest of the model: what a program
calls that walks the tensors itself (mergekit). The recipe, its checks and the engine are those of every merge.
"""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pymerge import methods
from pymerge.checkpoint import ITEMSIZE, Checkpoint, open_checkpoint, safe_name
from pymerge.engine.asking import asking_purify, asks_model, survey_scope
from pymerge.engine.inputs import InputFinder
from pymerge.engine.memory import merge_in_memory
from pymerge.engine.plan import Options
from pymerge.engine.process import available_memory
from pymerge.errors import InputError, RecipeError
from pymerge.methods import REGISTRY, get
from pymerge.methods.base import Combine, Method
from pymerge.methods.names import nearest
from pymerge.methods.param import Param, params_of
from pymerge.recipe import ModelRef, Recipe
from pymerge.recipe.steps import Steps

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.statistics import Statistics

COMPARED = 64  # entries of a tensor that are compared with the model's file
# What to say where a method's own default looks at the whole model; others have a hyperparameter `scope`.
ONE_TENSOR = {"esm": "layer_power: 0", "fisher": "normalize: false", "pave": "pave.allocation: per_layer"}
BESIDE = {
    "stats": ("covariance", "what its layers see, made by `pymerge observe`"),
    "fisher": ("fisher", "the diagonal of its Fisher information, safetensors with the names of its parameters"),
}


@dataclass(frozen=True)
class Input:
    """One model's tensor. folder: where the model lies, if that is known and the tensors there are these."""

    label: str
    tensor: Tensor
    folder: str | None = None


def why_not(cls: type[Method]) -> str | None:
    """Why a method cannot merge one tensor at a time; None: it can."""
    if issubclass(cls, Combine) and cls.beside:
        return f"leaves {cls.beside} in a file beside the merged weights"
    if cls.sequential:
        return "observes each layer behind the layers merged before it"
    if "adapters" in cls.needs:
        return "merges the factors of LoRA adapters, not their product with the base added"
    if cls.name == "lines":
        return "needs a layer's place among all layers: say `scale: [a, a + b]`, a gradient over the layers"
    return None


def steps_of(kind: str) -> dict[str, type[Method]]:
    """The methods of one step that can merge one tensor at a time."""
    return {name: get(name) for name in methods.list(kind) if why_not(get(name)) is None}


def hyperparameters(cls: type[Method]) -> dict[str, Param]:
    """Name -> Param: those of a combine method, and behind `STEP.` those of the steps before and behind it."""
    found = {name: p for name, p in params_of(cls).items() if name != "style"}
    if "scale" in found:
        found["lambda"] = found["scale"]
    for step in (*steps_of("purify").values(), *steps_of("calibrate").values()):
        found |= {f"{step.name}.{name}": p for name, p in params_of(step).items()}
    return found


def merge_one(
    method: str, name: str, base: Input | None, models: Sequence[Input], parameters: Mapping[str, Any], threads: int
) -> Tensor:
    """The merged tensor, on the device and of the dtype of the first of base and models.

    parameters  of `hyperparameters`, and style, seed, spectral, rest, split, purify, calibrate (names, a comma between
                several), stats and fisher (a path for each model): lists have one entry a model, None: not given
    Raises      MergeError, before anything is computed for what is wrong with the parameters"""
    given = {key: value for key, value in parameters.items() if not is_empty(value)}
    beside = {key: given.pop(key) for key in BESIDE if key in given}
    check_beside(method, given, [model.label for model in models], beside)
    recipe = described(method, base is not None, len(models), frozen(given), frozenset(beside))
    check_scope(recipe, recipe.steps_for(name, 0.0))
    tensors = [*([base] if base is not None and recipe.combine_class.base_role == "first" else []), *models]
    refs = []
    for i, (ref, model) in enumerate(zip(recipe.models, tensors, strict=True)):
        extra: dict[str, Any] = {}
        if "stats" in beside:
            extra["statistics"] = statistics_of(beside["stats"][i], name, model)
        if "fisher" in beside:
            check_name(name, model)
            extra["fisher"] = ModelRef(path=beside["fisher"][i], value=beside["fisher"][i])
        refs.append(replace(ref, path=model.label, value={name: model.tensor}, **extra))
    found = [ref.statistics.value for ref in refs if ref.statistics is not None]
    if found and InputFinder(found, [], []).module_of(name) is None:
        refs = [replace(ref, statistics=None) for ref in refs]  # as a matrix without statistics among others
    root = replace(recipe.base, path=base.label, value={name: base.tensor}) if base and recipe.base else None
    first = (base or models[0]).tensor
    memory = available_memory()  # one tensor has no use for a budget, and the caller's program no word for it
    options = Options(memory=memory, threads=threads, device=str(first.device), progress=False)
    merged = merge_in_memory(replace(recipe, base=root, models=tuple(refs)), options)
    return merged[name].to(first.device)


def is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(one is None for one in value))


def frozen(given: Mapping[str, Any]) -> tuple[tuple[str, Hashable], ...]:
    return tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in sorted(given.items()))


@lru_cache(maxsize=512)
def described(
    method: str, has_base: bool, count: int, given: tuple[tuple[str, Any], ...], beside: frozenset[str]
) -> Recipe:
    """The checked recipe of tensors with these parameters; its models are empty."""
    options: dict[str, Any] = {}
    steps: dict[str, dict[str, Any]] = {}
    for key, value in given:
        value = list(value) if isinstance(value, tuple) else value
        step, dot, name = key.partition(".")
        if dot:
            steps.setdefault(step, {})[name] = value
        else:
            options[key] = value
    for kind in ("purify", "calibrate"):
        options[kind] = [{"method": name, **steps.pop(name, {})} for name in steps_named(options, kind)]
    if steps:
        unused = next(iter(steps))
        raise RecipeError(f"{unused}.{next(iter(steps[unused]))}: say {get(unused).step}: {unused} too")
    spectral, rest, split = (options.pop(key, None) for key in ("spectral", "rest", "split"))
    chosen = {} if spectral is None else {"include" if spectral else "exclude": ["*"]}
    options["spectral"] = chosen | ({} if rest is None else {"rest": rest})
    options["split"] = {} if split is None else {"*": split}
    placeholders = {"stats": "statistics", "fisher": "fisher"}
    options |= {placeholders[key]: [object() for _ in range(count)] for key in beside}
    return Recipe.from_kwargs({} if has_base else None, [{} for _ in range(count)], method, **options)


def steps_named(given: Mapping[str, Any], kind: str) -> list[str]:
    """The steps of one kind that are asked for. Raises RecipeError where there is none of that name."""
    names = [name.strip() for name in given.get(kind, "").split(",") if name.strip()]
    for name in names:
        cls = REGISTRY.get(name)
        if cls is None or cls.step != kind:
            raise RecipeError(f"{kind}: unknown method {name!r}: {nearest(name, steps_of(kind))}")
        if (reason := why_not(cls)) is not None:
            raise RecipeError(f"{kind}: {name} {reason}")
    return names


def check_beside(
    method: str, given: Mapping[str, Any], labels: Sequence[str], beside: Mapping[str, Sequence[str | None]]
) -> None:
    """Files are given for all models where a step needs them."""
    names = [method, *steps_named(given, "purify"), *steps_named(given, "calibrate")]
    for key, (need, what) in BESIDE.items():
        users = [name for name in names if need in get(name).needs]
        for label, path in zip(labels, beside.get(key, [None] * len(labels)), strict=True):
            if users and path is None:
                raise RecipeError(f"{users[0]} needs `{key}: FILE` among the parameters of {label}: {what}")


def check_scope(recipe: Recipe, steps: Steps) -> None:
    """Steps that look at all tensors before they merge any are refused: here they would see one."""
    asks: Method | None = asking_purify(steps)
    combine = asks_model(steps)
    if (combine is not None and combine.rounds) or survey_scope(steps) == "model":
        asks = steps.combine
    if asks is not None:
        say = ONE_TENSOR.get(asks.name, "scope: tensor")
        raise RecipeError(
            f"{asks.name} looks at the whole model first, here it is given one tensor at a time: say `{say}`, or run "
            "the merge with pymerge"
        )


def statistics_of(path: str, name: str, model: Input) -> ModelRef:
    """The opened statistics. Raises InputError where they are of other files than the model's."""
    real = os.path.realpath(path)
    if not os.path.isfile(real):
        raise InputError(f"stats: {path}: no such file (paths start from {os.getcwd()})")
    state = (real, os.stat(real).st_mtime_ns)
    found = opened(*state)
    if model.folder is not None:
        check_origin(*state, model.label, model.folder)
    if InputFinder([found], [], []).module_of(name) is not None:
        check_name(name, model)
    return ModelRef(path=path, value=found)


@lru_cache(maxsize=64)
def opened(path: str, changed: int) -> Statistics:
    from pymerge.statistics import open_statistics

    return open_statistics(path)


@lru_cache(maxsize=64)
def check_origin(path: str, changed: int, label: str, folder: str) -> None:
    """The model must be the one that was observed."""
    finder = InputFinder([opened(path, changed)], [label], [model_at(folder, os.stat(folder).st_mtime_ns)])
    finder.check_origin(0)
    for kind, message in finder.problems:
        raise kind(message)


@lru_cache(maxsize=64)
def model_at(folder: str, changed: int) -> Checkpoint:
    return open_checkpoint(folder)


def check_name(name: str, model: Input) -> None:
    """What lies beside a model knows layers by the names of the model's own tensors: where another layer's tensor is
    merged under this name (slices), it would be of the wrong layer."""
    import torch

    from pymerge.engine.generic import DTYPES

    if model.folder is None:
        return
    checkpoint = model_at(model.folder, os.stat(model.folder).st_mtime_ns)
    stored = checkpoint[name] if name in checkpoint else None
    if stored is not None and stored.dtype in DTYPES:
        count = min(COMPARED, model.tensor.numel(), math.prod(stored.shape))
        buffer = bytearray(count * ITEMSIZE[stored.dtype])
        stored.read_into(memoryview(buffer), 0)
        start = torch.frombuffer(buffer, dtype=DTYPES[stored.dtype]).to(model.tensor.dtype)
        if torch.equal(start, model.tensor.reshape(-1)[:count].cpu()):
            return
    raise InputError(
        f"{safe_name(name)}: what is merged is not the tensor of this name in {model.label}: stats and fisher know "
        "layers by their names in the model, merge without `slices`"
    )
