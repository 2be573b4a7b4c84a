"""NearSwap: the base takes over the other model's entries where the two are near each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.methods.base import REQUIRED, Combine, TaskGroup, TensorInfo, param, register
from pymerge.methods.blocks import BLOCK, in_blocks

if TYPE_CHECKING:
    from torch import Tensor

_FLOOR = 1e-6  # mergekit 0.1.5 nearswap: smaller differences count as this


@register("nearswap")
@dataclass(frozen=True, kw_only=True)
class NearSwap(Combine):
    """W = w W_1 + (1 - w) W_0 (the base), w = min(1, t / max(|W_1 - W_0|, 1e-6)), entry by entry.

    Entries that differ by at most t become the other model's, the others move by t towards it. t = 0 is the base. With
    t below 1e-6, entries that differ by less than that move by t / 1e-6 of the way.
    """

    t: float = param(REQUIRED, "how far an entry may move", low=0.0)

    paper = "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"
    base_role = "first"
    models = (1, 1)
    unit = "entries"

    def combine(self, group: TaskGroup) -> Tensor:
        return in_blocks(group, self._combine)

    def _combine(self, group: TaskGroup) -> Tensor:
        base, other = (t.float() for t in group.tuned)
        weight = (other - base).abs_().clamp_(min=_FLOOR).reciprocal_().mul_(self.t).clamp_(max=1.0)
        return base.lerp(other, weight)

    def workspace(self, info: TensorInfo) -> int:
        return 24 * min(BLOCK, info.numel)
