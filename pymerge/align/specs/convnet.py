"""Paths of layers, one behind the other: plain, depthwise and grouped convolutions, Linears, and norms behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pymerge.align.specs.builder import Builder, Place
from pymerge.align.specs.rows import modules_of, number
from pymerge.errors import InputError


@dataclass(frozen=True)
class Layer:
    """A convolution or a Linear, and the norms behind it."""

    module: str
    norms: tuple[str, ...] = ()


def layers_of(shapes: Mapping[str, Sequence[int]], modules: Sequence[str]) -> list[Layer]:
    """Modules in the order of the forward pass as layers, each with the norms (weights of one axis) that follow it."""
    layers: list[Layer] = []
    for module in modules:
        if rank(shapes, module) > 1:
            layers.append(Layer(module))
        elif not layers:
            raise InputError(f"{module}: a norm in front of the first layer has no permutation group")
        else:
            layers[-1] = replace(layers[-1], norms=(*layers[-1].norms, module))
    return layers


def path(
    builder: Builder, layers: Sequence[Layer], into: Place | None, out: Place | None, config: Mapping[str, Any]
) -> None:
    """The entries of layers that lead from the units `into` to the units `out` (None: not permuted), with a group of
    its own, named as the layer, behind each but the last. Those groups are seen at the next layer's input.

    Channels that a depthwise convolution takes and gives are one group. Of a grouped convolution the blocks move whole,
    and its outputs within each block; its inputs keep their places in the block.
    Raises InputError where blocks cannot be kept: a grouped convolution at either end or behind another."""
    last = ""  # module that gives the units `into`
    for i, layer in enumerate(layers):
        following = layers[i + 1].module if i + 1 < len(layers) else None
        shape = builder.shapes[f"{layer.module}.weight"]
        blocks = blocks_in(builder, layer.module, into)
        if blocks > 1 and shape[1] == 1 and shape[0] == blocks:
            made = into
            builder.module(layer.module, made)
        else:
            made = out if following is None else made_by(builder, layer.module, into, following)
            if blocks > 1 and (made is None or made.view != "v"):
                raise InputError(f"{layer.module}: a grouped convolution has a group only between two that are not")
            reads = input_place(builder, layer.module, into)
            builder.module(layer.module, made, None if blocks > 1 else reads)
            if i and reads is not None:
                see(builder, layer.module, last, reads)
        for name in layer.norms:
            norm(builder, name, made, config, layer=len(shape) == 2)
        last = (layer.module, *layer.norms)[-1]
        into = replace(made, view="o") if made is not None and made.view == "v" else made
    if into != out:
        raise InputError(f"{layers[-1].module}: no permutation groups for a path that ends in a depthwise convolution")


def blocks_in(builder: Builder, module: str, into: Place | None) -> int:
    """In how many blocks a convolution takes its inputs: 1 of a plain one, all channels of a depthwise one."""
    shape = builder.shapes[f"{module}.weight"]
    return 1 if into is None or len(shape) == 2 else max(1, width(builder, into) // shape[1])


def width(builder: Builder, place: Place) -> int:
    """The number of units of a place, by the first entry of its group: outputs of some layer."""
    return builder.size(builder.entries[place.group][0])


def made_by(builder: Builder, module: str, into: Place | None, following: str) -> Place:
    """The units that a layer gives to the following one."""
    if into is not None and into.view == "q":
        return replace(into, view="v")
    shape, next_shape = builder.shapes[f"{module}.weight"], builder.shapes[f"{following}.weight"]
    blocks = shape[0] // next_shape[1]
    if len(next_shape) == 2 or blocks <= 1 or next_shape[1] == 1:
        return Place(module)
    builder.blocks[module] = blocks
    return Place(module, "q")


def input_place(builder: Builder, module: str, into: Place | None) -> Place | None:
    """Where the units lie on a layer's input: of channels flattened in front of a Linear, all positions of each."""
    if into is None:
        return None
    shape, units = builder.shapes[f"{module}.weight"], width(builder, into)
    if len(shape) > 2:
        return into
    if shape[1] % units:
        raise InputError(
            f"{module}.weight {list(shape)}: {shape[1]} inputs are no multiple of the {units} units in front of it; if "
            "the layers come in another order, list them as `layers` in the config"
        )
    return replace(into, span=shape[1] // units)


def see(builder: Builder, module: str, last: str, place: Place) -> None:
    """Units are seen at the input of the layer that takes them; where they are flattened, at the output of the module
    that gives them."""
    if place.span > 1:
        builder.tap(last, "output", replace(place, span=1), axis=1)
    else:
        builder.tap(module, "input", place, axis=-1 if rank(builder.shapes, module) == 2 else 1)


def norm(builder: Builder, module: str, place: Place | None, config: Mapping[str, Any], *, layer: bool) -> None:
    """A BatchNorm (it has running statistics), else a LayerNorm where `layer` says so, else a GroupNorm, whose groups
    are then the blocks of the units."""
    builder.module(module, place)
    running = [f"{module}.{name}" for name in ("running_mean", "running_var") if f"{module}.{name}" in builder.shapes]
    for name in running:
        if place is None:
            builder.fixed.append(name)
        else:
            builder.axis(name, 0, replace(place, similarity=False), "out")
    if running or layer or place is None:
        return
    groups = number(config, "num_groups")
    if builder.blocks.setdefault(place.group, groups) != groups or place.view != "units":
        raise InputError(f"{module}: its groups are not the blocks of the convolution beside it, which is not covered")


def weighted(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The modules that have a weight."""
    return [module for module in modules_of(shapes) if f"{module}.weight" in shapes]


def rank(shapes: Mapping[str, Sequence[int]], module: str) -> int:
    return len(shapes[f"{module}.weight"])
