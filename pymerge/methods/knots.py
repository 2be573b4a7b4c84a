"""KnOTS: adapters aligned by one singular value decomposition, then merged by TIES."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pymerge.methods.base import AdapterCombine, Combine, Factors, TaskGroup, TensorInfo, param, register
from pymerge.methods.matrices import OfTaskVectors
from pymerge.methods.selection import trim_authors
from pymerge.methods.surveyed import SurveyedCombine
from pymerge.methods.ties import MergeFunc, Ties
from pymerge.ops.delta_rule import KEEP_ALL_TIES, Cut, DeltaRule

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 1e-5  # singular values up to here are dropped, whatever the largest (gstoica27/KnOTS task_merger.py)
FINE_BITS = 15  # of the magnitudes' bits, that the second round looks at


@register("knots")
@dataclass(frozen=True, kw_only=True)
class Knots(AdapterCombine, SurveyedCombine):
    """U times the merge of the blocks S V_t, where [D_1 ... D_T] = U S [V_1 ... V_T]: tasks in one basis of outputs.

    The blocks are merged like task vectors: by TIES in its authors' form, or by their sum or mean, which are those of
    the task vectors. With scope "global" magnitudes are ranked over all matrices of the model (as the authors of KnOTS
    do; factors are decomposed three times), else over the matrix. values: whether the singular values are in the blocks
    (as with these authors) or multiply the merged block (as in the Core Space repository, with scope tensor and density
    0.1). Singular values up to 1e-5 are dropped.

    Cost: QR decompositions of (m + n) (sum r)^2, and T k n entries ranked, k <= sum r; no matrix [m, n].
    """

    merge: Literal["ties", "sum", "mean"] = param("ties", "how the blocks become one", choices=("ties", "sum", "mean"))
    density: float = param(0.2, "share of entries that TIES keeps", low=0, high=1)
    merge_func: MergeFunc = param("mean", "how agreeing entries become one", choices=("mean", "sum", "max"))
    scope: Literal["tensor", "global"] = param("global", "what is ranked together", choices=("tensor", "global"))
    values: bool = param(True, "singular values are in what is merged")
    scale: float = param(0.6, "lambda, multiplies the merged update")

    paper = "arXiv 2410.19735"

    @property
    def unit(self) -> Literal["tensor", "entries"]:  # type: ignore[override]
        return "tensor"

    @property
    def survey_scope(self) -> Literal["tensor", "model"]:
        return "model" if self.scope == "global" and self.merge == "ties" and self.density < 1 else "tensor"

    @property
    def rounds(self) -> int:
        return 2

    def survey(self, group: TaskGroup) -> tuple[Tensor, int]:
        """Histograms of the leading bits of the magnitudes, int64 [T, 2^16], and how many entries each task has."""
        from pymerge.ops.delta_histogram import delta_histogram

        blocks = self.aligned(group).blocks
        return delta_histogram(None, blocks), blocks[0].numel()

    def join(self, one: tuple[Tensor, int], other: tuple[Tensor, int]) -> tuple[Tensor, int]:
        return one[0] + other[0], one[1] + other[1]

    def decide(self, answer: tuple[Tensor, int]) -> Combine:
        counts, entries = answer
        rank = trim_authors(self.density, entries)
        places = [_place(row, rank) for row in counts]
        return _SecondRound(of=self, prefix=tuple(b for b, _ in places), left=tuple(n for _, n in places))

    def combine_factors(self, group: TaskGroup, cut: Cut | None = None) -> Factors:
        """cut: the magnitudes from which entries are kept; None: asked of the matrix."""
        from pymerge.ops.delta import merge_by_rule

        found = self.aligned(group)
        group.notes.facts["rank"] = len(found.blocks[0])
        info = replace(group.info, shape=tuple(found.blocks[0].shape))
        return Factors(found.left, merge_by_rule(self._rule(info, cut), None, found.blocks))

    def aligned(self, group: TaskGroup) -> _Aligned:
        import torch

        from pymerge.methods.cores import orthonormal

        assert group.factors is not None
        left, by_left = orthonormal([part.left for part in group.factors])
        rights = [torch.linalg.qr(part.right.mT.double()) for part in group.factors]
        stack = torch.cat([b @ a.R.mT for b, a in zip(by_left, rights, strict=True)], dim=1)
        u, s, vh = torch.linalg.svd(stack, full_matrices=False)
        kept = int((s > SMALLEST).sum())
        u, s, vh = u[:, :kept], s[:kept], vh[:kept]
        inside, outside = (s[:, None] * vh, u) if self.values else (vh, u * s)
        parts = inside.split([len(a.R) for a in rights], dim=1)
        blocks = [(part @ a.Q.mT).float() for part, a in zip(parts, rights, strict=True)]
        return _Aligned((left @ outside).float(), blocks)

    def _rule(self, info: TensorInfo, cut: Cut | None) -> DeltaRule:
        if self.merge != "ties":
            return OfTaskVectors(how=self.merge).rule(info)
        rule = Ties(density=self.density, merge_func=self.merge_func, scope="tensor").rule(info)
        return rule if cut is None else replace(rule, top=None, top_cut=cut)

    def factor_workspace(self, info: TensorInfo, rank: int) -> int:
        """The blocks, one of them in float64, what is ranked of one, the merged block."""
        return 4 * rank * max(info.shape) * (info.tasks + 5) + 8 * 8 * rank**2


@dataclass(frozen=True)
class _Aligned:
    """left [m, k]; T blocks [k, n]; float32."""

    left: Tensor
    blocks: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class _SecondRound(AdapterCombine, SurveyedCombine):
    """Knows the leading bits of each task's border, and how many entries with these bits are kept."""

    of: Knots
    prefix: tuple[int, ...]
    left: tuple[int, ...]
    name = "knots"

    @property
    def unit(self) -> Literal["tensor", "entries"]:  # type: ignore[override]
        return "tensor"

    @property
    def rounds(self) -> int:
        return 1

    def survey(self, group: TaskGroup) -> Tensor:
        from pymerge.ops.delta_histogram import delta_histogram

        return delta_histogram(None, self.of.aligned(group).blocks, prefix=self.prefix)

    def join(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other

    def decide(self, answer: Tensor) -> Combine:
        import torch

        fine = [_place(row, rank)[0] for row, rank in zip(answer, self.left, strict=True)]
        bits = [(high << FINE_BITS) | low for high, low in zip(self.prefix, fine, strict=True)]
        theta = torch.tensor(bits, dtype=torch.int32).numpy().tobytes()
        index = torch.full((len(bits),), KEEP_ALL_TIES, dtype=torch.int64).numpy().tobytes()
        return _Decided(of=self.of, cut=Cut(theta=theta, index=index))

    def factor_workspace(self, info: TensorInfo, rank: int) -> int:
        return self.of.factor_workspace(info, rank)


@dataclass(frozen=True, kw_only=True)
class _Decided(AdapterCombine):
    """Knows what is kept of each task."""

    of: Knots
    cut: Cut
    name = "knots"

    def combine_factors(self, group: TaskGroup) -> Factors:
        return self.of.combine_factors(group, self.cut)

    def factor_of(self, name: str, observed: bool) -> float:
        return self.of.scale


def _place(counts: Any, rank: int) -> tuple[int, int]:
    """(bin, entries of that bin that are among the first), counted from the largest on, of the rank-th entry."""
    down = counts.flip(0).cumsum(0)
    at = int((down < rank).sum())
    before = int(down[at - 1]) if at else 0
    return len(counts) - 1 - at, rank - before
