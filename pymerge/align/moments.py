"""Inner products as similarities: means, deviations and the division by them, alike for weights and activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pymerge.align.groups import View
from pymerge.align.match import Blocks, UnitSet

DEVIATIONS = 1e-7  # least product of two standard deviations (the released code's)
NORM = 1e-8  # least norm of a unit in cosine similarity (likewise)


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Of the units of one set in one model over what they are compared on.

    mean, size  float64 [n]: mean and standard deviation; for cosine 0 and the norm
    count       entries that a unit has
    least       of the product of two sizes (correlation), of each size (cosine: already applied)
    """

    mean: Tensor
    size: Tensor
    count: int
    least: float


def moments(count: int, first: Tensor, second: Tensor, cosine: bool) -> Moments:
    """From sums and sums of squares, float64 [n]. A variance that rounding makes negative is 0."""
    if cosine:
        return Moments(mean=torch.zeros_like(first), size=second.sqrt().clamp(min=NORM), count=1, least=0.0)
    mean = first / count
    return Moments(mean=mean, size=(second / count - mean**2).clamp(min=0).sqrt(), count=count, least=DEVIATIONS)


def folded(blocks: Blocks, sums: Tensor) -> Tensor:
    """Sums of a shared view's rows [r n] by unit [n]."""
    return sums.view(blocks.count, blocks.queries, blocks.width).sum(1).flatten()


def similarities(
    blocks: Blocks, unit_set: UnitSet, grams: Mapping[View, Tensor], of: tuple[Moments, Moments]
) -> dict[View, Tensor]:
    """Inner products as similarities; see `match` for the form. Those given are overwritten.

    grams    view -> float32 [n, n], of the anchor's rows with a model's; any of the set's views
    of       the anchor's moments, the model's
    Returns  of the base view, and of the shared one where r > 1: their sum over a unit's rows is the correlation."""
    one, other = (m.size.float() for m in of)
    scale = (one[:, None] * other).clamp_(min=of[0].least).mul_(of[0].count)  # [n, n]
    found: dict[View, Tensor] = {}
    base = grams.get(unit_set.base)
    if unit_set.shared in grams:
        assert unit_set.shared is not None
        shared = grams[unit_set.shared]
        if blocks.queries == 1:
            base = shared if base is None else base.add_(shared)
        else:
            k, r, d = blocks.count, blocks.queries, blocks.width
            shared.view(k, r, d, k, r, d).div_(scale.view(k, 1, d, k, 1, d))
            found[unit_set.shared] = shared
    if base is None:
        base = torch.zeros_like(scale)
    means = [(m.mean * of[0].count).float() if at == 0 else m.mean.float() for at, m in enumerate(of)]
    found[unit_set.base] = base.addr_(means[0], means[1], alpha=-1).div_(scale)
    return found


def matched_similarity(
    blocks: Blocks, unit_set: UnitSet, products: Mapping[View, Tensor], of: tuple[Moments, Moments], index: Tensor
) -> float:
    """Mean similarity of matched units, from the inner products float64 [n] of their rows alone."""
    total = torch.zeros_like(of[0].mean)
    for view, values in products.items():
        total += folded(blocks, values) if view == unit_set.shared else values
    mean, size = of[1].mean[index], of[1].size[index]
    scale = (of[0].size * size).clamp(min=of[0].least)
    return float(((total / of[0].count - of[0].mean * mean) / scale).mean())
