"""Core Space: adapters merged in the coordinates of the spaces that they share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pymerge.methods.base import AdapterCombine, Factors, TaskGroup, TensorInfo, param, register
from pymerge.methods.iso_c import IsoC
from pymerge.methods.matrices import OfTaskVectors
from pymerge.methods.ties import Ties
from pymerge.methods.tsv_m import TsvM

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.methods.base import Combine

Merge = Literal["sum", "mean", "ties", "tsv_m"]


@register("core_space")
@dataclass(frozen=True, kw_only=True)
class CoreSpace(AdapterCombine):
    """U C V with C merged from the cores C_t = U^T B_t A_t V^T, U and V the singular directions of all B and all A.

    U are the left singular vectors of [B_1 ... B_T], V the right ones of the stacked A_t: nothing is lost. The cores
    are merged by their sum, mean, TIES or TSV-M, and then made isotropic (all singular values equal to their mean).
    An adapter's scale counts as part of B. Sum and mean are those of the task vectors.

    Cost: two decompositions of (m + n) (sum r)^2; no matrix [m, n].
    """

    merge: Merge = param("tsv_m", "how the cores become one", choices=("sum", "mean", "ties", "tsv_m"))
    density: float = param(0.1, "share of a core's entries that TIES keeps", low=0, high=1)
    isotropic: bool = param(True, "equal singular values for the merged core")
    scale: float = param(1.0, "lambda, multiplies the merged update; tuned by the authors")

    paper = "arXiv 2509.17786"

    def combine_factors(self, group: TaskGroup) -> Factors:
        import torch

        from pymerge.methods.cores import orthonormal

        assert group.factors is not None
        left, by_left = orthonormal([part.left for part in group.factors])
        right, by_right = orthonormal([part.right.mT for part in group.factors])
        u = torch.linalg.svd(torch.cat(by_left, 1), full_matrices=False).U
        v = torch.linalg.svd(torch.cat(by_right, 1), full_matrices=False).U
        cores = tuple((u.mT @ b @ (v.mT @ a).mT).float() for b, a in zip(by_left, by_right, strict=True))
        merged = self._merged(group, cores)
        group.notes.facts["core"] = list(merged.shape)
        return Factors((left @ (u @ merged.double())).float(), (right @ v).mT.float().contiguous())

    def _merged(self, group: TaskGroup, cores: tuple[Tensor, ...]) -> Tensor:
        info = replace(group.info, shape=tuple(cores[0].shape))
        combine: Combine = {
            "sum": OfTaskVectors(how="sum"),
            "mean": OfTaskVectors(how="mean"),
            "ties": Ties(density=self.density, scope="tensor"),
            "tsv_m": TsvM(),
        }[self.merge]
        merged = combine.combine(replace(group, info=info, factors=None, tuned=cores))
        if not self.isotropic:
            return merged
        return IsoC().combine(replace(group, info=info, factors=None, tuned=(merged,)))

    def factor_workspace(self, info: TensorInfo, rank: int) -> int:
        return 8 * (info.tasks + 12) * rank**2
