"""GPT-2: learned positions, q, k and v in one Conv1D, whose weights are stored [in, out]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pymerge.align.groups import Spec
from pymerge.align.specs.builder import Builder, Place
from pymerge.align.specs.rows import RESIDUAL, Row, embeddings, fill, fused, number

ROWS = (
    embeddings("wte|wpe"),
    Row("c_attn", fused("{at}"), RESIDUAL, transposed=True, tap="output"),
    Row(r"(?<=attn\.)c_proj", RESIDUAL, Place("{at}", "o"), transposed=True, tap="input"),
    Row("c_fc", Place("{at}"), RESIDUAL, transposed=True),
    Row("c_proj", RESIDUAL, Place("{at}"), transposed=True, tap="input"),
    Row("ln_f", RESIDUAL, tap="output"),
    Row("ln_[12]", RESIDUAL),
)
FIXED = ("*.attn.bias", "*.attn.masked_bias")  # masks that old checkpoints store


def spec(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], *, tie_heads: bool) -> Spec:
    """Groups "residual", one of Heads and one MLP a layer; the channels of q and k move too."""
    tied = config.get("tie_word_embeddings", True)
    head = Row("lm_head|score", None, Place("residual", similarity=not tied))
    builder = Builder(shapes)
    fill(builder, (*ROWS, head), number(config, "n_head", "num_attention_heads"), tie_heads=tie_heads)
    return builder.spec(FIXED)
