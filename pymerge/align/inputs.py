"""Models as `find_permutations` takes them: opened, checked against each other, run over samples."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pymerge.align.activations import PairCollector
from pymerge.align.groups import Heads, Spec
from pymerge.align.specs import floating_shapes, spec_for
from pymerge.checkpoint import Checkpoint, open_checkpoint, safe_name
from pymerge.errors import ExtraTensor, InputError, MissingTensor, ShapeMismatch
from pymerge.statistics.names import stored_module
from pymerge.statistics.observing import load_model

Model = nn.Module | str | os.PathLike[str] | Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model: its weights by the names that a spec uses, its config (empty where it has none), what to call it."""

    source: Model
    weights: Checkpoint
    config: Mapping[str, Any]
    label: str


@contextmanager
def opened(models: Sequence[Model]) -> Iterator[list[Opened]]:
    """At least two models with the same floating parameters, or InputError."""
    if len(models) < 2:
        raise InputError(f"find_permutations: needs at least two models, got {len(models)}")
    with ExitStack() as stack:
        found = [open_model(model, f"model {t}", stack) for t, model in enumerate(models)]
        for other in found[1:]:
            check_alike(found[0], other)
        yield found


def open_model(model: Model, label: str, stack: ExitStack) -> Opened:
    if isinstance(model, nn.Module):
        to_dict: Any = getattr(getattr(model, "config", None), "to_dict", dict)
        return Opened(source=model, weights=open_checkpoint(tensors_of(model)), config=to_dict(), label=label)
    weights = open_checkpoint(model)
    if not isinstance(model, Mapping) or weights is model and weights.path is not None:
        label = safe_name(weights.where)
    if weights is not model:  # one that was given open stays open
        stack.callback(weights.close)
    return Opened(
        source=model,
        weights=weights,
        config=weights.config or {},
        label=label,
    )


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers, each storage once."""
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    saved = module.state_dict()
    return parameters | {name: buffer for name, buffer in module.named_buffers() if name in saved}


def check_alike(one: Opened, other: Opened) -> None:
    first, second = floating_shapes(one.weights), floating_shapes(other.weights)
    for error, left, right in ((MissingTensor, first, second), (ExtraTensor, second, first)):
        if names := [name for name in left if name not in right]:
            here, there = (one, other) if left is first else (other, one)
            raise error(
                f"{there.label} lacks {len(names)} of the parameters of {here.label}, the first is "
                f"{safe_name(names[0])}: permutations need models of one architecture"
            )
    for name, shape in first.items():
        if second[name] != shape:
            raise ShapeMismatch(
                f"{safe_name(name)}: {list(shape)} in {one.label}, {list(second[name])} in {other.label}: permutations "
                "need models of one architecture"
            )


def resolved_spec(spec: Spec | str | None, anchor: Opened, tie_heads: bool) -> Spec:
    shapes = floating_shapes(anchor.weights)
    if isinstance(spec, Spec):
        spec.check(shapes)
        if not tie_heads and any(isinstance(group, Heads) for group in spec.groups):
            raise InputError(
                "this spec ties the heads of q, k and v: the mode zip and tie_heads=False need one of Units"
            )
        return spec
    return spec_for(shapes, anchor.config, spec, tie_heads=tie_heads)


def seen_on(models: Sequence[Opened], spec: Spec, batches: Iterable[Any], *, all_pairs: bool) -> PairCollector:
    """What the groups' units do on the batches. Models in folders are loaded, all of them at once."""
    modules: list[nn.Module] = []
    named: list[dict[str, nn.Module]] = []
    for model in models:
        if isinstance(model.source, Mapping):
            raise InputError(f"{model.label} is a state dict: batches need models that run; give modules or folders")
        module, names = model.source, {}
        if not isinstance(module, nn.Module):
            module, _, names = load_model(module)
        modules.append(module)
        named.append({stored_module(name, names): part for name, part in module.named_modules()})
    collector = PairCollector(spec, named, all_pairs=all_pairs)
    collector.run(modules, batches)
    return collector
