"""Where in the depth of the model a tensor sits: the t of gradients."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

LAYER = re.compile(r"\.(\d+)\.")


def layer_positions(names: Iterable[str]) -> dict[str, float]:
    """Tensor name -> t: its `layer_depths`, 0 outside of all layers."""
    return {name: depth or 0.0 for name, depth in layer_depths(names).items()}


def layer_depths(names: Iterable[str]) -> dict[str, float | None]:
    """Tensor name -> index / (layers - 1) of its layer, 1 in a stack of one layer, None outside of all layers.

    A tensor's layer is the first number between dots in its name; what stands before it names the stack, so an encoder
    and a decoder each run from 0 to 1.
    """
    names = list(names)
    found = {name: match for name in names if (match := LAYER.search(name))}
    last: dict[str, int] = {}
    for name, match in found.items():
        stack = name[: match.start()]
        last[stack] = max(last.get(stack, 0), int(match[1]))
    depths: dict[str, float | None] = dict.fromkeys(names)
    for name, match in found.items():
        layers = last[name[: match.start()]]
        depths[name] = int(match[1]) / layers if layers else 1.0
    return depths


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What is known of a merge's tensors by their names.

    positions  the t of gradients
    depths     place in the output's stack
    own        names in each of the models, where they are others than in the output
    """

    positions: Mapping[str, float]
    depths: Mapping[str, float | None]
    own: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Iterable[str]) -> Self:
        """Of whole models."""
        depths = layer_depths(names)
        return cls(positions={name: depth or 0.0 for name, depth in depths.items()}, depths=depths)
