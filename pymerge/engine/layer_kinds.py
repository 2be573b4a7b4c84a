"""Do layers that are put together fit the config.json that the output gets?"""

from __future__ import annotations

from collections.abc import Sequence

from pymerge.checkpoint import Checkpoint, safe_name
from pymerge.engine.layer_config import own_layers
from pymerge.engine.problems import Problems
from pymerge.errors import MissingTensor, ShapeMismatch
from pymerge.recipe.stacks import LayerName

Kind = frozenset[tuple[str, tuple[int, ...]]]  # names within a layer, with shapes
SHOWN = 3


def kinds_by_layer(model: Checkpoint, stack: str) -> dict[int, Kind]:
    """What is in each layer of a stack."""
    found: dict[int, set[tuple[str, tuple[int, ...]]]] = {}
    for name, tensor in model.items():
        layer = LayerName.of(name)
        if layer is not None and layer.stack == stack:
            found.setdefault(layer.number, set()).add((layer.rest, tensor.shape))
    return {number: frozenset(kind) for number, kind in found.items()}


def check_kinds(
    output: Checkpoint,
    config: str,
    parts: Sequence[tuple[Checkpoint, str]],
    stack: str,
    problems: Problems,
    *,
    listed: bool,
) -> None:
    """The config must describe what the output is given: tensors of the names and shapes that its own model has, in
    layers as that model has them at their place; at any place where the config lists the layers.

    output  the model whose config it is, called `config`
    parts   the tensors that give each part its names, under those of the output; and what they are called"""
    stored = kinds_by_layer(output, stack)
    count = own_layers(output.config, max(stored) + 1)
    own = {number: kind for number, kind in stored.items() if number < count}
    for part, label in parts:
        for number, kind in kinds_by_layer(part, stack).items():
            wanted = set(own.values()) if listed else {own[min(number, max(own))]}
            if kind in wanted:
                continue
            differ = sorted(min((kind ^ other for other in wanted), key=len))
            shown = ", ".join(f"{safe_name(name)} {list(shape)}" for name, shape in differ[:SHOWN])
            problems.add(
                ShapeMismatch,
                f"{safe_name(stack)}.{number} of the output, from {label}, is no such layer as config.json of {config} "
                f"has there: {shown}{' ...' if len(differ) > SHOWN else ''} in one of the two",
            )
        for name, tensor in part.items():
            layer = LayerName.of(name)
            if layer is not None and layer.stack == stack:
                continue
            if name not in output:
                text = f"{safe_name(name)}: in {label}, absent from {config}, whose config.json the output gets"
                problems.add(MissingTensor, text)
            elif output[name].shape != tensor.shape:
                problems.add(
                    ShapeMismatch,
                    f"{safe_name(name)}: {list(tensor.shape)} in {label}, {list(output[name].shape)} in {config}, "
                    "whose config.json the output gets",
                )
