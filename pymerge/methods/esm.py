"""ESM: merging in the essential subspaces of the tasks, the directions in which an update moves a layer's outputs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from pymerge.methods.base import Combine, MatrixCombine, TaskGroup, TensorInfo, param, register
from pymerge.methods.matrices import Rest
from pymerge.methods.param import Auto
from pymerge.methods.surveyed import SurveyedCombine
from pymerge.methods.work import NOTHING, Work, cholesky_solve, eigen, passes, polar

if TYPE_CHECKING:
    from torch import Tensor

# Kinds of layers that share a mean norm: a part of the name, the first that fits counts. The authors' lists
# (kiddo127/ESM@fc82fe7, ESM-RoBERTa and ESM-ViT), then those of decoders and of other vision encoders.
KINDS: Final = (
    *(f"attention.self.{x}.weight" for x in ("query", "key", "value")),
    *(f"{x}.weight" for x in ("attention.output.dense", "intermediate.dense", "output.dense")),
    *("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
    *(f"{x}_proj.weight" for x in ("q", "k", "v", "o", "qkv", "out", "gate_up", "gate", "up", "down")),
    *(f"{x}.weight" for x in ("attn.c_attn", "attn.c_proj", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    *(f"attention.attention.{x}.weight" for x in ("query", "key", "value")),
)
_VISION = re.compile(r"(^|[._])(visual|vision\w*|image_encoder|vit|deit|beit|dinov2)[._]|attention\.attention\.")
_UNMERGED = re.compile(r"classifier|bias")  # the authors' RoBERTa code leaves these at the base


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The hyperparameters of one tensor, every default resolved."""

    vision: bool
    rank: int | None
    gain: float
    eig_power: float
    task_power: float
    dim_power: float
    layer_power: float
    task_norm: str
    other_2d: str
    scale_all: bool
    lam_tol: float
    polar_tol: float

    def rank_of(self, rows: int, tasks: int) -> int:
        """k, directions kept of each task."""
        return max(1, min(rows, self.rank) if self.rank is not None else rows // tasks)


@register("esm")
@dataclass(frozen=True, kw_only=True)
class Esm(SurveyedCombine, MatrixCombine):  # pyright: ignore[reportIncompatibleVariableOverride]
    """M = gain sbar(U) sbar(V) polar(U) polar(V), U = [E_1 w_1 | ..], V = [w_1 E_1^T D_1; ..].

    sbar is the mean singular value.

    E_t holds the top k = m / T eigenvectors of D_t G_t D_t^T, G_t = X_t^T X_t the second moment of the layer's input in
    model t; w_t = lambda^eig_power, of mean 1. Rows of V are scaled by (||D_t|| / mean)^task_power, then its columns by
    (norm / mean)^dim_power, and M by (||M|| / mean over its kind of layers)^layer_power. For that mean all updates are
    computed twice: first for their norms alone, which is all that is kept of them. layer_power=0 needs one pass.

    Matrices without statistics are merged as TSV-M does, or get the mean (`other_2d`). With preset "roberta" biases and
    classifiers stay at the base. Directions without signal (lam_tol, and never more than rows of X) weigh nothing, and
    polar factors are partial isometries (polar_tol): the authors' result where that is defined. Fewer than 2 k rows are
    listed in the summary (`few_rows`). One task is not left as it is: its singular values become equal.

    Low-rank updates stored in bfloat16 carry rounding errors of full rank that whitening makes as strong as the update;
    a larger lam_tol (1e-3) leaves them out.
    """

    preset: Literal["vit", "roberta"] | None = param(
        Auto("vit for parameters of vision encoders, by name, else roberta", str),
        "the authors' settings for vision encoders, or for language models",
        choices=("vit", "roberta"),
    )
    scale: float = param(1.0, "alpha, multiplies the merged updates that scale_scope says")
    scale_scope: Literal["esd", "all"] | None = param(
        Auto("esd; roberta: all", str), "esd: only matrices with statistics", choices=("esd", "all")
    )
    rank: int | None = param(Auto("m / T", int), "k, directions kept of each task", low=1)
    gain: float | None = param(Auto("2; roberta: 1"), "multiplies matrices with statistics", low=0, open_low=True)
    eig_power: float = param(0.15, "power of the eigenvalues that weigh directions; 0: all weigh the same", low=0)
    task_power: float | None = param(Auto("2; roberta: 0"), "power of a task's relative norm", low=0)
    dim_power: float | None = param(Auto("2; roberta: 0"), "power of an input dimension's relative norm", low=0)
    layer_power: float = param(2.0, "power of a layer's norm relative to its kind; 0: one pass is enough", low=0)
    task_norm: Literal["delta", "truncated", "released"] = param(
        "delta",
        "a task's norm: of D_t, of E_t^T D_t, or of all coordinates with unit vectors beyond row N (authors' code)",
        choices=("delta", "truncated", "released"),
    )
    other_2d: Literal["svd", "mean"] = param("svd", "matrices without statistics", choices=("svd", "mean"))
    lam_tol: float = param(1e-11, "eigenvalues up to this share of the largest are none", low=0, high=1)
    polar_tol: float = param(1e-5, "likewise singular values of U and V", low=0, high=0.1)

    paper = "arXiv 2602.20208"
    needs = ("covariance",)

    @property
    def unit(self) -> Literal["tensor"]:  # type: ignore[override]
        return "tensor"

    def settings(self, name: str) -> Settings:
        """For the tensor of this name."""
        vision = self.preset == "vit" if self.preset is not None else bool(_VISION.search(name))
        polarized = 2.0 if vision else 0.0
        return Settings(
            vision=vision,
            rank=self.rank,
            gain=self.gain if self.gain is not None else (2.0 if vision else 1.0),
            eig_power=self.eig_power,
            task_power=self.task_power if self.task_power is not None else polarized,
            dim_power=self.dim_power if self.dim_power is not None else polarized,
            layer_power=self.layer_power,
            task_norm=self.task_norm,
            other_2d=self.other_2d,
            scale_all=self.scale_scope == "all" if self.scale_scope is not None else not vision,
            lam_tol=self.lam_tol,
            polar_tol=self.polar_tol,
        )

    def rest_of(self, name: str) -> tuple[Rest, float]:
        settings = self.settings(name)
        how: Rest = "base" if not settings.vision and _UNMERGED.search(name) else "mean"
        return how, self.scale if settings.scale_all else 1.0

    def factor_of(self, name: str, observed: bool) -> float:
        return self.scale if observed or self.settings(name).scale_all else 1.0

    def update(self, group: TaskGroup) -> Tensor:
        """The merged update before the layer's factor and `scale`, float32 [m, n]."""
        from pymerge.methods import _esm

        return _esm.merged_update(group, self.settings(group.info.name))

    @property
    def rounds(self) -> int:
        return int(self.layer_power != 0)

    def survey(self, group: TaskGroup) -> dict[str, float]:
        """The norm of the update, where the layer is of a kind."""
        if kind_of(group.info.name) is None:
            return {}
        from pymerge.methods import _esm

        return {group.info.name: _esm.norm64(self.update(group))}

    def join(self, one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
        return one | other

    def decide(self, answer: dict[str, float] | None) -> Combine:
        return EsmMerge(method=self, factors=layer_factors(answer or {}, self.layer_power))

    def workspace(self, info: TensorInfo) -> int:
        return esm_bytes(info, self.settings(info.name))

    def work(self, info: TensorInfo) -> Work:
        """Eigenproblem and products of each task, polar factors; as often as updates are computed."""
        if len(info.shape) != 2:
            return NOTHING
        m, n = info.shape
        count = max(1, m // info.tasks)
        q = min(count * info.tasks, n)
        if m <= n:
            task = Work(double=float(m) * n**2 + 2.0 * m**2 * n) + eigen(m, count / m)
        else:
            task = cholesky_solve(n, 0) + Work(double=3.0 * m * n**2) + eigen(n, min(1.0, count / n))
        task += Work(single=2.0 * m * n * count) + passes(info.numel + 2 * n * n, 4)
        each = task.times(info.tasks) + polar(m, q) + polar(q, n) + Work(single=2.0 * m * n * q)
        return each.times(1 + self.rounds)


@dataclass(frozen=True, kw_only=True)
class EsmMerge(Combine):
    """The last pass. factors: of the layers, by name; others have 1."""

    method: Esm
    factors: Mapping[str, float]

    name = "esm"
    needs = ("covariance",)
    spectral = True

    def combine(self, group: TaskGroup) -> Tensor:
        name = group.info.name
        update = self.method.update(group)
        factor = self.factors.get(name, 1.0)
        group.notes.facts["layer_factor"] = factor
        return update.mul_(factor).mul_(self.method.factor_of(name, group.inputs is not None))

    def workspace(self, info: TensorInfo) -> int:
        return self.method.workspace(info)


def kind_of(name: str) -> str | None:
    """The kind of layer that a parameter belongs to; part i of a matrix that is merged in parts ends in [i]."""
    bare, bracket, part = name.partition("[")
    return next((kind + bracket + part for kind in KINDS if kind in bare), None)


def layer_factors(norms: Mapping[str, float], power: float) -> dict[str, float]:
    """(||M|| / mean over the kind)^power of each layer, 1 where the whole kind is 0."""
    kinds: dict[Any, list[float]] = {}
    for name, norm in norms.items():
        kinds.setdefault(kind_of(name), []).append(norm)
    means = {kind: math.fsum(found) / len(found) for kind, found in kinds.items()}
    return {name: (norm / mean) ** power if (mean := means[kind_of(name)]) else 1.0 for name, norm in norms.items()}


def esm_bytes(info: TensorInfo, settings: Settings) -> int:
    """Both stacks [m, K] and [K, n], and the larger of: what the directions of one task take (moments, products and
    eigenproblem in float64), what a polar factor takes (columns and factor, at most 20 times its Gram matrix, 15 times
    a large one); both as measured. Without statistics all directions are stacked, whatever the rank."""
    m, n = info.shape[0], info.numel // max(1, info.shape[0])
    q, tall = min(m, n), m > n
    k = info.tasks * max(1, q // info.tasks, min(settings.rank_of(m, info.tasks), q))
    task = 4 * m * n + 8 * ((6 if tall else 2) * m * n + (4 if tall else 2) * n * n + 5 * q * q)
    left, right = min(m, k), min(k, n)
    polars = max(8 * m * k + 15 * 8 * left * left, 4 * m * k + 8 * k * n + 20 * 8 * right * right)
    return 4 * k * (m + n) + max(task, polars)
