"""Clusters of units of several models (zip), and the mean over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pymerge.align.groups import Spec


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """For every group the merged unit that each unit of each model goes to.

    spec    groups without heads' common order (Units only)
    index   group name -> int64 [T, n], values 0..n-1, each at least once
    models  labels of the T models
    report  as of Permutations
    """

    spec: Spec
    index: Mapping[str, Tensor]
    models: tuple[str, ...]
    report: Mapping[str, Any] = field(default_factory=dict)

    def merged(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        """A parameter of the merged model, float32, from that of each model: mean over the models of what reaches
        each cluster; over the cluster's units on axes that produce them, sums on axes that consume them."""
        raise NotImplementedError
