"""DELLA, with the sign election of TIES."""

from __future__ import annotations

from dataclasses import dataclass

from pymerge.methods.base import param, register
from pymerge.methods.della_linear import DellaLinear


@register("della")
@dataclass(frozen=True, kw_only=True)
class Della(DellaLinear):
    """Random mask by magnitude and rescale as `della_linear`, then only entries with the elected sign are merged.

    The sign of an entry is that of the sum of the weighted task vectors, + where it is zero.
    """

    normalize: bool = param(True, "divide by the weights of the entries that agree")

    elects = True
