"""GPT-NeoX and Pythia: q, k and v fused head by head, rotary positions on the first channels of each head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pymerge.align.groups import Spec
from pymerge.align.specs.builder import Builder, Place
from pymerge.align.specs.rows import RESIDUAL, Row, embeddings, fill, fused, number, refuse_untied

ROWS = (
    embeddings("embed_in"),
    Row(r"(?<=attention\.)dense", RESIDUAL, Place("{at}", "o"), tap="input"),
    Row("dense_h_to_4h", Place("{at}"), RESIDUAL),
    Row("dense_4h_to_h", RESIDUAL, Place("{at}"), tap="input"),
    Row("final_layer_norm", RESIDUAL, tap="output"),
    Row("[^.]*layernorm", RESIDUAL),
    Row("embed_out|score|classifier|qa_outputs", None, RESIDUAL),
)
FIXED = ("*.attention.bias", "*.attention.masked_bias", "*rotary_emb.inv_freq")  # buffers that old checkpoints store


def spec(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], *, tie_heads: bool) -> Spec:
    """Groups "residual", one of Heads and one MLP a layer; the channels of q and k that are not rotated move too."""
    refuse_untied(tie_heads)
    heads = number(config, "num_attention_heads")
    width = number(config, "hidden_size") // heads
    builder = Builder(shapes, rotary=int(width * rotated(config)))
    attention = Row("query_key_value", fused("{at}", interleave=heads), RESIDUAL, tap="output")
    fill(builder, (attention, *ROWS), heads)
    return builder.spec(FIXED)


def rotated(config: Mapping[str, Any]) -> float:
    """The share of each head that is rotated; by newer configs in the description of the positions."""
    described = config.get("rope_parameters") or {}
    return config.get("rotary_pct", described.get("partial_rotary_factor", 0.25))
