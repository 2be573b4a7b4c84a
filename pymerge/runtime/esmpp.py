"""A model merged by ESM++ with its experts: each sample is routed in each layer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pymerge.errors import CorruptFile, InputError
from pymerge.runtime.routing import Experts, Router
from pymerge.runtime.tasks import number_of
from pymerge.statistics.collect import linear_modules
from pymerge.statistics.names import stored_module, stored_names

EXPERTS = "esmpp_experts.safetensors"
FORMAT = "1"


def load(path: str | os.PathLike[str], task: int | str | None = None) -> nn.Module:
    """The transformers model in a folder that pymerge wrote with merge_method esmpp, with routing on each routed layer:
    y = W x + b + B_t (A_t x), t the task whose prototype is nearest (cosine) to the sample's mean input.

    task    number of a model in the merge, from 0, or its path as the recipe gave it: its expert for every sample
    The mean is over the tokens that `attention_mask` [batch, tokens] keeps. With a cache (`generate`) the prompt
    (the first piece of it, where it is taken in pieces) decides, and each layer keeps its choice. The class is the one
    that the config names; `routes(model)` says what was chosen.
    Returns the model in eval mode, in the dtype it is stored in; its parameters are the merged model's
    Raises  InputError (no experts there, another format, no such task, no transformers, layers that the class has not)
    Memory  the model and its experts: T r (m + n) numbers for a matrix [m, n]
    Cost    2 r (m + n) operations a token and routed layer beside 2 m n; fused attention runs twice."""
    from pymerge.statistics.observing import load_model

    check_folder(path)
    return attach(load_model(path)[0], path, task)


def attach(model: nn.Module, path: str | os.PathLike[str], task: int | str | None = None) -> nn.Module:
    """As `load`, for a module that has the merged weights already: routes its layers, in place, and returns it."""
    file = check_folder(path)
    if any(isinstance(module, Experts) for module in model.modules()):
        raise InputError(f"{type(model).__name__} has experts already: load the merged model again")
    with opened(file) as experts:
        said = experts.metadata() or {}
        if said.get("pymerge_esmpp") != FORMAT:
            raise InputError(
                f"{file}: experts of format {FORMAT} are read, found: {said.get('pymerge_esmpp', 'none')}; merge again"
            )
        labels, prototypes = json.loads(said["tasks"]), json.loads(said["prototypes"])
        layers = layers_of(model, prototypes, file)
        router = Router(labels, None if task is None else number_of(task, labels))
        found = [(layer, *read(experts, file, name, prototypes[name], layer)) for name, layer in layers.items()]
    for name, (layer, left, right, means) in zip(layers, found, strict=True):
        Experts(name, left, right, means, router).attach(layer)
    for module in callers(model):
        router.watch(module)
    return model


def force(model: nn.Module, task: int | str | None) -> None:
    """From now on every sample takes this task's experts; None: each its own."""
    router = router_of(model)
    router.forced = None if task is None else number_of(task, router.labels)


def routes(model: nn.Module) -> dict[str, Tensor]:
    """Matrix -> number of the task that each sample of the last call was given, int64 [B]."""
    return dict(router_of(model).last)


def router_of(model: nn.Module) -> Router:
    for module in model.modules():
        if isinstance(module, Experts):
            return module.router
    raise InputError(f"{type(model).__name__} has no experts: use `pymerge.runtime.esmpp.load`")


def check_folder(path: str | os.PathLike[str]) -> Path:
    file = Path(path) / EXPERTS
    if not file.is_file():
        raise InputError(f"{os.fspath(path)}: no {EXPERTS} here: not a model merged with merge_method esmpp")
    return file


@contextmanager
def opened(file: Path) -> Any:
    try:
        with safe_open(file, "pt") as experts:
            yield experts
    except SafetensorError as error:
        raise CorruptFile(f"{file}: damaged: {error}; `pymerge verify` checks the whole folder") from error


def layers_of(model: nn.Module, wanted: Mapping[str, Any], file: Path) -> dict[str, nn.Module]:
    """Matrix, as the checkpoint calls it -> the module that has it."""
    names = stored_names(model, wanted) if hasattr(model, "base_model_prefix") else {name: name for name in wanted}
    found: dict[str, nn.Module] = {}
    for name, module in linear_modules(model, lambda name: True).items():
        suffix = ".in_proj_weight" if isinstance(module, nn.MultiheadAttention) else ".weight"
        found[stored_module(name, names) + suffix] = module
    lacking = [name for name in wanted if name not in found]
    if lacking:
        more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
        raise InputError(
            f"{file}: experts of {', '.join(lacking[:5])}{more}: {type(model).__name__} has no such linear layer"
        )
    return {name: found[name] for name in wanted}


def read(experts: Any, file: Path, name: str, prototypes: str, layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Factors in the layer's dtype on its device, prototypes in float32."""
    weight = layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight
    assert isinstance(weight, Tensor)
    m, n = weight.shape[::-1] if type(layer).__name__ == "Conv1D" else weight.shape
    left, right, means = (experts.get_tensor(key) for key in (f"{name}.B", f"{name}.A", prototypes))
    if left.shape[1] != m or right.shape[2] != n:
        raise InputError(
            f"{file}: experts of {name} are for a matrix [{left.shape[1]}, {right.shape[2]}], the layer's is [{m}, {n}]"
        )
    return left.to(weight), right.to(weight), means.to(weight.device)


def callers(model: nn.Module) -> list[nn.Module]:
    """The model and those inside it: their arguments tell batch, padding and cache."""
    try:
        from transformers import PreTrainedModel
    except ImportError:
        return [model]
    return [module for module in model.modules() if module is model or isinstance(module, PreTrainedModel)]
