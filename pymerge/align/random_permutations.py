"""Random permutations that a spec allows: for checking specs, and solvers on scrambled models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from pymerge.align.groups import Group, Spec, Units
from pymerge.align.permutations import Permutations


def random_permutations(spec: Spec, models: Sequence[str], generator: Generator) -> Permutations:
    """Uniform over all permutations that the groups allow, for each model but the first."""
    index: dict[str, dict[str, Tensor]] = {}
    for group in spec.groups:
        drawn = [{view: torch.arange(n) for view, n in group.views().items()}]
        drawn += [draw(group, generator) for _ in models[1:]]
        index[group.name] = {view: torch.stack([vectors[view] for vectors in drawn]) for view in drawn[0]}
    return Permutations(spec=spec, index=index, models=tuple(models))


def draw(group: Group, generator: Generator) -> dict[str, Tensor]:
    """Index vectors of one model."""
    if isinstance(group, Units):
        width = group.size // group.blocks
        return {"units": in_blocks(shuffled(1, group.blocks, generator)[0], shuffled(group.blocks, width, generator))}
    kv_heads, queries, width = group.kv_heads, group.heads // group.kv_heads, group.width
    sigma, tau = shuffled(1, kv_heads, generator)[0], shuffled(kv_heads, queries, generator)
    still = torch.arange(group.rotary).expand(kv_heads, -1)
    kappa = torch.cat([still, shuffled(kv_heads, width - group.rotary, generator) + group.rotary], 1)
    rho = shuffled(kv_heads, width, generator)
    heads = in_blocks(sigma, tau)
    return {
        "q": in_blocks(heads, kappa.repeat_interleave(queries, 0)),
        "k": in_blocks(sigma, kappa),
        "v": in_blocks(sigma, rho),
        "o": in_blocks(heads, rho.repeat_interleave(queries, 0)),
    }


def in_blocks(order: Tensor, inner: Tensor) -> Tensor:
    """The permutation [b m] that takes blocks by `order` [b] and the units within each by `inner` [b, m]."""
    return (order[:, None] * inner.shape[1] + inner).flatten()


def shuffled(rows: int, n: int, generator: Generator) -> Tensor:
    """Independent permutations [rows, n]."""
    return torch.stack([torch.randperm(n, generator=generator) for _ in range(rows)])
