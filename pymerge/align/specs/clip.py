"""CLIP's vision and text towers, together or each alone, with the names of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pymerge.align.groups import Spec
from pymerge.align.specs.builder import Builder, Place
from pymerge.align.specs.rows import Row, fill, number, seen_at_the_end, tables

# Part of the config -> the beginnings of names of its tower and of what reads it.
TOWERS = {
    "vision_config": ("vision_model.", "visual_projection.", "classifier."),
    "text_config": ("text_model.", "text_projection."),
}


def spec(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], *, tie_heads: bool) -> Spec:
    """Of each tower the groups "….residual" (seen at the projection's input) and, of each layer, "….self_attn" (heads)
    and "….mlp".

    config   of both towers, or of the one that the model is
    The joint space that the projections lead to is not permuted. A tower without a projection or a classifier gives out
    its residual stream, then in the anchor's order."""
    found = {
        section: {name: shape for name, shape in shapes.items() if name.startswith(begins)}
        for section, begins in TOWERS.items()
    }
    towers = [
        tower(part, config.get(section, config), Place(TOWERS[section][0] + "residual"), tie_heads)
        for section, part in found.items()
        if part
    ]
    towers = towers or [tower(shapes, config, Place("residual"), tie_heads)]
    whole = Spec(
        groups=tuple(group for part in towers for group in part.groups),
        fixed=("logit_scale", *(name for part in towers for name in part.fixed)),
    )
    whole.check(shapes)
    return whole


def tower(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], residual: Place, tie_heads: bool) -> Spec:
    rows = (
        Row("patch_embedding", residual),
        Row("position_embedding|token_embedding", residual, transposed=True),
        Row("q_proj", Place("{at}", "q"), residual, tap="output"),
        Row("k_proj", Place("{at}", "k"), residual, tap="output"),
        Row("v_proj", Place("{at}", "v"), residual),
        Row("out_proj", residual, Place("{at}", "o"), tap="input"),
        Row("fc1", Place("{at}"), residual),
        Row("fc2", residual, Place("{at}"), tap="input"),
        Row("layer_norm[12]|pre_layrnorm|post_layernorm|final_layer_norm", residual),
        Row("visual_projection|text_projection|classifier", None, residual, tap="input"),
    )
    builder = Builder(shapes)
    tables(builder, "class_embedding", residual)
    fill(builder, rows, number(config, "num_attention_heads"), tie_heads=tie_heads)
    seen_at_the_end(builder, residual, Row("post_layernorm|final_layer_norm", residual))
    return builder.spec()
