"""ESM++: a model merged by ESM, and beside it for each task a low-rank expert of what it lost, chosen by the input."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from pymerge.methods.base import param, register
from pymerge.methods.esm import Esm
from pymerge.methods.param import Auto

# What reads a block's input in vision encoders: the authors' attn.in_proj and mlp.c_fc, and their counterparts.
_READERS: Final = re.compile(
    r"attn\.(in_proj_weight|qkv\.weight|c_attn\.weight)$|[._](q|k|v)_proj\.weight$|attention\.(query|key|value)\.weight$"
    r"|mlp\.(c_fc|fc1)\.weight$|intermediate\.dense\.weight$"
)


@register("esmpp")
@dataclass(frozen=True, kw_only=True)
class EsmPlusPlus(Esm):
    """ESM's merged model W_M, and beside it low-rank experts B_t A_t of what each task lost, chosen for each sample.

    B_t holds the top r eigenvectors of R_t G_t R_t^T, R_t = W_t - W_M with W_M as written, A_t = B_t^T R_t; G_t is the
    second moment of the layer's input in model t, its normalised mean p_t the task's prototype. They are written to
    esmpp_experts.safetensors in the output folder, for which routed matrices are read a second time.
    `pymerge.runtime.esmpp.load` makes the model of them that adds in each routed layer the expert whose prototype is
    nearest to the sample's mean input. Biases, norms, heads and other weights are the merged model's.

    Factors have the dtype of the output; with preset "roberta" they are rounded to float16. With r = rank of R_t, and
    as many rows of statistics, an expert gives back its model's matrix. All other parameters are ESM's.
    """

    expert_rank: int | None = param(
        Auto("32; roberta: 8", int), "r, rank of each task's expert; at most a matrix's smaller side", low=1
    )
    routed: str | None = param(
        Auto("vit: what reads a block's input (query, key, value, first of the MLP); roberta: all", str),
        "name patterns, with spaces between, of the matrices that get experts; they must have statistics",
    )

    paper = "arXiv 2606.19164"
    beside = "experts"

    def routes(self, name: str) -> bool:
        """Whether the matrix of this name gets experts, if it has statistics."""
        if self.routed is not None:
            return any(fnmatchcase(name, pattern) for pattern in self.routed.split())
        return not self.settings(name).vision or bool(_READERS.search(name))

    def rank_of_expert(self, name: str, shape: tuple[int, ...]) -> int:
        given = self.expert_rank if self.expert_rank is not None else 32 if self.settings(name).vision else 8
        return min(given, *shape)

    def factor_dtype(self, name: str, dtype: str) -> str:
        """Safetensors code of the factors of a matrix that is written in `dtype`."""
        return dtype if self.settings(name).vision else "F16"
