"""The input of one module, read from its model's statistics when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pymerge.statistics.store import Statistics


@dataclass(frozen=True, kw_only=True)
class InputOf:
    """What methods get for one module of one model (methods.base.LayerInput): holds nothing itself."""

    statistics: Statistics = field(repr=False)
    module: str

    @property
    def rows(self) -> int:
        return self.statistics.rows[self.statistics.header.modules[self.module]]

    @property
    def mean(self) -> Tensor:
        mean = self.statistics.part(self.module, "mean")
        assert mean is not None
        return mean

    @property
    def samples(self) -> Tensor | None:
        return self.statistics.part(self.module, "samples")

    @property
    def triangle(self) -> Tensor | None:
        return self.statistics.part(self.module, "triangle")

    def second_moment(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.statistics[self.module].second_moment(dtype)
