"""ViT and DeiT with the names of timm (q, k and v fused) and of transformers (checkpoints, and modules in memory)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pymerge.align.groups import Spec
from pymerge.align.specs.builder import Builder, Place
from pymerge.align.specs.rows import RESIDUAL, Row, fill, fused, number, seen_at_the_end, tables
from pymerge.errors import InputError

ROWS = (
    Row(r"patch_embed\.proj|patch_embeddings\.projection", RESIDUAL),
    Row(r"attn\.qkv", fused("{at}.attn"), RESIDUAL, tap="output"),
    Row(r"attn\.[qk]_norm", None),
    Row(r"attn\.proj", RESIDUAL, Place("{at}.attn", "o"), tap="input"),
    Row(r"attention\.(attention\.query|q_proj)", Place("{at}.attention", "q"), RESIDUAL, tap="output"),
    Row(r"attention\.(attention\.key|k_proj)", Place("{at}.attention", "k"), RESIDUAL, tap="output"),
    Row(r"attention\.(attention\.value|v_proj)", Place("{at}.attention", "v"), RESIDUAL),
    Row(r"attention\.(output\.dense|o_proj)", RESIDUAL, Place("{at}.attention", "o"), tap="input"),
    Row(r"mlp\.fc1|intermediate\.dense", Place("{at}.mlp"), RESIDUAL),
    Row(r"mlp\.fc2|output\.dense", RESIDUAL, Place("{at}.mlp"), tap="input"),
    Row(r"norm[12]?|norm_pre|fc_norm|layernorm(_before|_after)?", RESIDUAL),
    Row("ls[12]", RESIDUAL),
    Row("head|head_dist|classifier|cls_classifier|distillation_classifier", None, RESIDUAL, tap="input"),
    Row(r"pooler\.dense", None, RESIDUAL),
)
LAST_NORM = Row("norm|fc_norm|layernorm", RESIDUAL)
POSITIONS = r"pos_embed|position_embeddings"
TOKENS = r"cls_token|dist_token|reg_token|distillation_token|gamma_[12]"


def spec(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], *, tie_heads: bool) -> Spec:
    """Groups "residual" (seen at the head's input) and, of each layer, "….attn" or "….attention" (heads) and "….mlp".

    config   num_attention_heads (timm's own config has none: add num_heads)
    A model without a classifier gives out the residual stream, then in the anchor's order. Norms over q and k (timm's
    qk_norm) are shared by the heads: channels of q and k stay in place, heads still move."""
    normed = any(name.endswith("attn.q_norm.weight") for name in shapes)
    if normed and not tie_heads:
        raise InputError("tie_heads=False has no form where q and k are normed: their channels may not be permuted")
    refuse_rotary(config)
    builder = Builder(shapes, rotary=None if normed else 0)
    if not tables(builder, POSITIONS, RESIDUAL):
        raise InputError(
            "no table of positions (pos_embed): positions that rotate q and k, or bias them, are not covered"
        )
    tables(builder, TOKENS, RESIDUAL)
    fill(builder, ROWS, number(config, "num_attention_heads", "num_heads"), tie_heads=tie_heads)
    seen_at_the_end(builder, RESIDUAL, LAST_NORM)
    return builder.spec()


def refuse_rotary(config: Mapping[str, Any]) -> None:
    """timm's models with rotary positions have the names of others."""
    architecture = str(config.get("architecture", ""))
    if "rope" in architecture or architecture.startswith("eva"):
        raise InputError(f"no permutation groups for {architecture}: its positions rotate q and k")
