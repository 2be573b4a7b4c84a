"""Llama and its relatives: gated MLPs, rotary positions, grouped queries, RMS norms, experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pymerge.align.groups import Spec
from pymerge.align.specs.builder import Builder, Place
from pymerge.align.specs.rows import RESIDUAL, Row, embeddings, fill, number
from pymerge.errors import InputError

ROWS = (
    embeddings("embed_tokens"),
    Row("q_proj", Place("{at}", "q"), RESIDUAL, tap="output"),
    Row("k_proj", Place("{at}", "k"), RESIDUAL, tap="output"),
    Row("v_proj", Place("{at}", "v"), RESIDUAL),
    Row("o_proj", RESIDUAL, Place("{at}", "o"), tap="input"),
    Row("gate_proj|up_proj", Place("{at}"), RESIDUAL),
    Row("down_proj", RESIDUAL, Place("{at}"), tap="input"),
    Row("q_norm", Place("{at}", "q")),
    Row("k_norm", Place("{at}", "k")),
    Row("norm", RESIDUAL, tap="output"),
    Row("[^.]*norm", RESIDUAL),
    Row("lm_head|score", None, RESIDUAL),
)
FIXED = ("*rotary_emb.inv_freq",)


def spec(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], *, tie_heads: bool) -> Spec:
    """Groups "residual", one of Heads and one MLP a layer. Inside a head of q and k nothing moves (rotary positions)."""
    if not tie_heads:
        raise InputError("tie_heads=False has no form under rotary positions: q and k may not be permuted in a head")
    builder = Builder(shapes, rotary=None)
    fill(builder, ROWS, number(config, "num_attention_heads"))
    return builder.spec(FIXED)
