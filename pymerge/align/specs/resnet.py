"""ResNet and ResNeXt, BatchNorm or GroupNorm, with the names of torchvision and timm or of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from pymerge.align.groups import Spec
from pymerge.align.specs.builder import Builder, Place
from pymerge.align.specs.convnet import Layer, input_place, layers_of, path, rank, weighted
from pymerge.errors import InputError

BLOCK = re.compile(r"(?P<prefix>.*?)(?:layer(\d+)\.(\d+)|encoder\.stages\.(\d+)\.layers\.(\d+))\.(?P<rest>.+)")
STEM = re.compile(r"conv1(\.\d+)?|(?:bn|gn|norm)1|embedder\.embedder\.(convolution|normalization)")
INNER = re.compile(r"(?:conv|bn|gn|norm)\d+|layer\.\d+\.(convolution|normalization)")
SHORTCUT = ("shortcut.", "downsample.")
HEAD = re.compile(r"(.*\.)?(fc|linear|classifier|head|classifier\.1)")


def spec(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], *, tie_heads: bool) -> Spec:
    """Groups "residual.0", "residual.1", … : the streams, each as long as blocks add to it without a convolution in the
    shortcut; and one behind each convolution inside a block, named as the convolution.

    config   num_groups, where the norms are GroupNorms: each group then has so many blocks
    A model without a classifier gives out its last stream, then in the anchor's order. Pre-activation, squeeze and
    excitation and shortcuts without parameters that widen the stream are refused."""
    stem, blocks = parts(shapes)
    if any(layer.norms for inner, _ in blocks.values() for layer in inner) and not stem[-1].norms:
        raise InputError("no norm behind the first convolution: pre-activation ResNets have no permutation groups here")
    builder = Builder(shapes, rotary=None)
    stream = Place("residual.0")
    path(builder, stem, None, stream, config)
    for inner, shortcut in blocks.values():
        before = stream
        if shortcut:
            stream = Place(f"residual.{int(before.group.rpartition('.')[2]) + 1}")
            builder.tap(shortcut[0].module, "input", before, axis=1)
        path(builder, inner, before, stream, config)
        if shortcut:
            path(builder, shortcut, before, stream, config)
    builder.tap(list(blocks)[-1], "output", stream, axis=1)
    for module in weighted(shapes):
        if HEAD.fullmatch(module) and rank(shapes, module) > 1:
            builder.module(module, None, input_place(builder, module, stream))
    return builder.spec()


def parts(shapes: Mapping[str, Sequence[int]]) -> tuple[list[Layer], dict[str, tuple[list[Layer], list[Layer]]]]:
    """The layers of the stem, and of each block, in order, those inside and those of its shortcut."""
    blocks: dict[tuple[int, ...], dict[str, tuple[list[str], list[str]]]] = {}
    prefix = ""
    for module in weighted(shapes):
        if match := BLOCK.fullmatch(module):
            prefix = match["prefix"]
            at = tuple(int(number) for number in match.groups()[1:5] if number is not None)
            sides = blocks.setdefault(at, {}).setdefault(module.removesuffix(f".{match['rest']}"), ([], []))
            if match["rest"].startswith(SHORTCUT):
                sides[1].append(module)
            elif INNER.fullmatch(match["rest"]):
                sides[0].append(module)
    stem = [module for module in weighted(shapes) if STEM.fullmatch(module.removeprefix(prefix))]
    if not blocks or not stem:
        raise InputError("not a ResNet: it has no conv1 and layer1.0 (nor transformers' embedder and encoder.stages.0)")

    def in_order(modules: Sequence[str], begins: int) -> list[Layer]:
        def forward(module: str) -> tuple[float, float, bool]:
            numbers = [float(number) for number in re.findall(r"\d+", module[begins:])]
            first, second = (*numbers, inf, inf)[:2]
            return first, second, rank(shapes, module) == 1

        return layers_of(shapes, sorted(modules, key=forward))

    found = {
        name: (in_order(sides[0], len(name)), in_order(sides[1], len(name)))
        for at in sorted(blocks)
        for name, sides in blocks[at].items()
    }
    return in_order(stem, len(prefix)), found
