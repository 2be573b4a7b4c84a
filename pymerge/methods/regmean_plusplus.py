"""RegMean++: RegMean on what the layers see in the merged model instead of in the models that it is made of."""

from __future__ import annotations

from dataclasses import dataclass

from pymerge.methods.base import register
from pymerge.methods.regmean import RegMean


@register("regmean_plusplus")
@dataclass(frozen=True, kw_only=True)
class RegMeanPlusPlus(RegMean):
    """RegMean behind merged layers: X_t is what a layer of model t sees when merged blocks feed its block.

    They make their hidden states of task t's samples. Embeddings and all else that is no matrix are averaged first.

    A block is an entry of a module list (a transformer layer); inside of it the model's own weights are used. Needs
    `data` beside the models: each block runs twice, with the model's weights and with the merged ones.

    Cost: RegMean's; two forward passes a model.
    """

    paper = "arXiv 2508.03121"
    sequential = True
