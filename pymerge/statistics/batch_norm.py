"""Running statistics of batch norms, taken anew: a merged or aligned model has other activations than its parents."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pymerge.errors import InputError
from pymerge.statistics.observing import call


def reset_batch_norm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replaces the running mean and variance of every batch norm by the mean over the batches of each batch's own.

    batches  what the model is called with, as for `observe`; large ones, of the data that the model is for
    Returns  the number of batch norms; without any the model is not run
    Raises   InputError if there is no batch
    Cost     one forward pass; each batch norm normalises by its batch, all other modules are in eval mode
    Source   arXiv 2403.01753, released code; the repair of merged networks is that of arXiv 2211.08403"""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return 0
    rest = iter(batches)
    first = next(rest, rest)
    if first is rest:
        raise InputError("reset_batch_norm: there is no batch")
    training = {module: module.training for module in model.modules()}
    momentum = {norm: norm.momentum for norm in norms}
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over batches
        with torch.no_grad():
            for batch in chain((first,), rest):
                call(model, batch)
    finally:
        for module, before in training.items():
            module.training = before
        for norm, before in momentum.items():
            norm.momentum = before
    return len(norms)
