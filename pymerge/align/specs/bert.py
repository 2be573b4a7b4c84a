"""BERT and RoBERTa, with the heads that transformers puts on them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pymerge.align.groups import Spec
from pymerge.align.specs.builder import Builder, Place
from pymerge.align.specs.rows import RESIDUAL, Row, embeddings, fill, modules_of, number

ROWS = (
    embeddings("(?:word|position|token_type)_embeddings"),
    Row(r"self\.query", Place("{at}", "q"), RESIDUAL, tap="output"),
    Row(r"self\.key", Place("{at}", "k"), RESIDUAL, tap="output"),
    Row(r"self\.value", Place("{at}", "v"), RESIDUAL),
    Row(r"(?<=attention\.)output\.dense", RESIDUAL, Place("{at}", "o"), tap="input"),
    Row(r"intermediate\.dense", Place("{at}.intermediate"), RESIDUAL),
    Row(r"output\.dense", RESIDUAL, Place("{at}.intermediate"), tap="input"),
    Row(r"classifier\.dense", Place("classifier"), RESIDUAL),
    Row(r"classifier\.out_proj", None, Place("classifier"), tap="input"),
    Row("qa_outputs", None, RESIDUAL),
)
NORMS = Row("LayerNorm", RESIDUAL)
FIXED = ("cls.predictions.bias", "lm_head.bias")


def spec(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], *, tie_heads: bool) -> Spec:
    """Groups "residual", one of Heads and one MLP a layer, and what is inside the heads on top."""
    builder = Builder(shapes)
    rows = (*ROWS, *pooler(shapes, config), *language_model(config), NORMS)
    fill(builder, rows, number(config, "num_attention_heads"), tie_heads=tie_heads)
    last = [module for module in modules_of(shapes) if re.search(r"layer\.\d+\.output\.LayerNorm$", module)]
    if last:
        layer = max(last, key=lambda module: int(module.split(".")[-3]))
        builder.tap(layer, "output", RESIDUAL)
    return builder.spec(FIXED)


def pooler(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> tuple[Row, ...]:
    """The pooler's units move where a layer on top takes them; as the model's output they stay."""
    modules = modules_of(shapes)
    by_token = any("TokenClassification" in name for name in config.get("architectures") or ())
    stored = any(module.endswith("pooler.dense") for module in modules)
    classifier = Row("classifier", None, Place("pooler") if stored and not by_token else RESIDUAL)
    taken = "cls.seq_relationship" in modules or ("classifier" in modules and not by_token)
    return (
        Row(r"pooler\.dense", Place("pooler") if taken else None, RESIDUAL),
        Row(r"cls\.seq_relationship", None, Place("pooler"), tap="input"),
        classifier,
    )


def language_model(config: Mapping[str, Any]) -> tuple[Row, ...]:
    """The head of a masked language model. Its decoder is the embedding, or has units of its own in front of it."""
    tied = config.get("tie_word_embeddings", True)
    inner = RESIDUAL if tied else Place("transform")
    return (
        Row(r"predictions\.transform\.dense|lm_head\.dense", inner, RESIDUAL),
        Row(r"predictions\.transform\.LayerNorm|lm_head\.layer_norm", inner),
        Row(r"predictions\.decoder|lm_head\.decoder", None, Place(inner.group, similarity=not tied)),
    )
