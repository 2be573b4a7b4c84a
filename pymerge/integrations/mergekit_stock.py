"""mergekit's own methods with pymerge's operators: where they sort every entry of a task vector to find those of some
ranks (ties, breadcrumbs, della and kin), the ranks are found without sorting, or by a faster sort.

The result is mergekit's, bit for bit and with the same random draws, where no two magnitudes are equal; of equal ones
at the border of a selection its sort keeps any, pymerge the first. dare ranks nothing and stays as it is.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import math

import torch
from mergekit.merge_methods import generalized_task_arithmetic as user
from mergekit.sparsify import RescaleNorm, SparsificationMethod, rescaled_masked_tensor, sparsify
from torch import Tensor

from pymerge.methods._della_mask import ascending, spread
from pymerge.methods.della_linear import PART
from pymerge.ops.delta import merge_by_rule
from pymerge.ops.delta_rule import DeltaRule


def accelerate() -> None:
    """mergekit's methods select by `select` from now on."""
    user.sparsify = select


def restore() -> None:
    """mergekit's methods select by their own function again."""
    user.sparsify = sparsify


def select(
    tensor: Tensor,
    density: float,
    method: SparsificationMethod,
    gamma: float = 0,
    epsilon: float = 0,
    rescale_norm: RescaleNorm | None = None,
) -> Tensor:
    """mergekit's `sparsify`: the tensor with the entries set to zero that are not selected."""
    n = tensor.numel()
    if not 0 < density < 1 or n == 0 or tensor.requires_grad:  # the operators have no gradients
        return sparsify(tensor, density, method, gamma, epsilon, rescale_norm)
    if method == SparsificationMethod.magnitude:
        return window(tensor, 0, max(1, int(density * n)), rescale_norm)
    if method == SparsificationMethod.magnitude_outliers:
        kept = int(density * n)
        largest = min(int(gamma * n), n - kept)
        return window(tensor, largest, largest + kept, rescale_norm)
    rows = tensor.shape[1] if tensor.dim() > 1 else n
    if method == SparsificationMethod.della_magprune and 0 < density - epsilon and density + epsilon < 1 and rows > 1:
        return ranked_drop(tensor, density, epsilon, rescale_norm)
    return sparsify(tensor, density, method, gamma, epsilon, rescale_norm)


def window(tensor: Tensor, skip: int, top: int, norm: RescaleNorm | None) -> Tensor:
    """Keeps the ranks skip <= rank < top of the magnitudes, from the largest."""
    rule = DeltaRule(weights=(1.0,), top=(top,), skip=(skip,) if skip else None)
    kept = merge_by_rule(rule, None, [tensor.contiguous()], out_dtype=tensor.dtype)
    return kept if norm is None else rescaled_masked_tensor(tensor, (kept != 0).to(tensor.dtype), norm)


def ranked_drop(tensor: Tensor, density: float, epsilon: float, norm: RescaleNorm | None) -> Tensor:
    """Keeps entries at random, with probabilities linear in their rank along dimension 1: computed once for a row, in
    the dtype in which mergekit computes them for every entry."""
    exact = tensor.device.type != "cpu" or tensor.dtype == torch.bfloat16
    work = tensor.to(tensor.dtype if exact else torch.float32)
    rows = work.reshape(1, -1) if work.dim() < 2 else work
    rank = torch.arange(1, rows.shape[1] + 1, device=rows.device).to(work.dtype)
    share = ((rank - rank[0]) / (rank[-1] - rank[0])).clamp(0, 1)
    table = (density - epsilon) + share * 2 * epsilon
    chances = torch.empty_like(rows, memory_format=torch.contiguous_format)
    step = max(1, PART // math.prod(rows.shape[1:]))
    for first in range(0, rows.shape[0], step):
        part = slice(first, first + step)
        chances[part] = spread(table, ascending(rows[part].abs().float()))
    mask = torch.bernoulli(chances)
    return rescaled_masked_tensor(rows, mask, norm).to(tensor.dtype).reshape(tensor.shape)
