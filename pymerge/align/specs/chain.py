"""Plain chains of convolutions and Linears: VGG, AlexNet, MLPs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pymerge.align.groups import Spec
from pymerge.align.specs.builder import Builder
from pymerge.align.specs.convnet import layers_of, path, rank, weighted
from pymerge.errors import InputError

LAST = ("head", "classifier", "fc", "linear", "output", "out", "logits")


def spec(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], *, tie_heads: bool) -> Spec:
    """A group behind each layer but the last, named as the layer.

    config   layers: all modules in the order of the forward pass, where their names do not tell it; num_groups, where
             norms behind convolutions are GroupNorms
    Convolutions come before Linears; in front of the first Linear channels are flattened, or pooled to one position."""
    builder = Builder(shapes, rotary=None)
    path(builder, layers_of(shapes, order(shapes, config.get("layers"))), None, None, config)
    return builder.spec()


def order(shapes: Mapping[str, Sequence[int]], given: Sequence[str] | None) -> list[str]:
    """All modules with weights in the order of the forward pass: as given, or by the numbers in their names."""
    modules = weighted(shapes)
    if given is not None:
        if sorted(given) != sorted(modules):
            raise InputError(f"layers: {list(given)} are not the modules with weights, which are {modules}")
        return list(given)
    convolutions = numbered([module for module in modules if rank(shapes, module) > 2])
    linears = numbered([module for module in modules if rank(shapes, module) == 2])
    layers = [*convolutions, *linears]
    norms: dict[str, list[str]] = {layer: [] for layer in layers}
    for norm in sorted((module for module in modules if rank(shapes, module) == 1), key=numbers):
        norms[in_front(shapes, norm, layers)].append(norm)
    return [module for layer in layers for module in (layer, *norms[layer])]


def numbered(modules: Sequence[str]) -> list[str]:
    """Modules by the number in their names, which are otherwise alike; one that is called head or so comes last."""
    heads = [module for module in modules if module in LAST]
    others = [module for module in modules if module not in LAST]
    if len({pattern(module) for module in others}) > 1 or len(heads) > 1:
        raise InputError(f"which of {list(modules)} comes first? List all modules in order as `layers` in the config")
    return [*sorted(others, key=numbers), *heads]


def in_front(shapes: Mapping[str, Sequence[int]], norm: str, layers: Sequence[str]) -> str:
    """The layer that a norm follows: the one before it in the same Sequential, or the one with its number."""
    if beside := [layer for layer in layers if pattern(layer) == pattern(norm)]:
        found = [layer for layer in beside if numbers(layer) < numbers(norm)][-1:]
    else:
        size = shapes[f"{norm}.weight"][0]
        found = [layer for layer in layers if numbers(layer) == numbers(norm) and shapes[f"{layer}.weight"][0] == size]
    if len(found) != 1:
        raise InputError(f"which layer does {norm} follow? List all modules in order as `layers` in the config")
    return found[0]


def pattern(module: str) -> str:
    return re.sub(r"\d+", "#", module)


def numbers(module: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", module)]
