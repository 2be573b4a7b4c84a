"""Tied weights: one matrix that a model uses under two names, and may store once or twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pymerge.checkpoint.read import Checkpoint

# Vocabulary matrices of transformers architectures by the last parts of their names.
INPUT = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "shared.weight",
    "tok_embeddings.weight",
)
OUTPUT = (
    "lm_head.weight",
    "embed_out.weight",
    "cls.predictions.decoder.weight",
    "lm_head.decoder.weight",
    "output.weight",
    "proj_out.weight",
)
TEXT_CONFIGS = ("text_config", "language_config", "llm_config")
_ALSO_INPUT = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # T5 and BART repeat `shared` under these


def tied_pairs(model: Checkpoint) -> dict[str, str]:
    """Names that share the values of another one in this model: name -> name that holds them. The first may be stored
    or not.

    The model's config decides. Where it does not say (older configs leave out what is the default of their
    architecture), an output matrix that is not stored is tied, one that is stored is not."""
    tie = tie_setting(model.config)
    source = input_embedding(model)
    if tie is False or source is None or model.config is None:
        return {}
    pairs = {}
    for name in _candidates(source):
        if name != source and (name not in model or (tie and model[name].shape == model[source].shape)):
            pairs[name] = source
    return pairs


def feeds_head(model: Checkpoint, name: str) -> bool:
    """Whether the output head uses this embedding: by the config or, where it does not say, as no head is stored."""
    if name not in tied_pairs(model).values():
        return False
    return tie_setting(model.config) is True or not any(n.endswith(OUTPUT) for n in model)


def tie_setting(config: Mapping[str, Any] | None) -> bool | None:
    """`tie_word_embeddings` of a config, or of the text config inside it; None where neither says."""
    if config is None:
        return None
    for part in (config, *(v for k, v in config.items() if k in TEXT_CONFIGS)):
        if isinstance(part, dict) and isinstance(part.get("tie_word_embeddings"), bool):
            return part["tie_word_embeddings"]
    return None


def input_embedding(model: Checkpoint) -> str | None:
    """The stored input embedding of the language model; None where there is none or several could be meant."""
    for ending in ("shared.weight", *INPUT):
        found = [n for n in model if n == ending or n.endswith("." + ending)]
        if ending.endswith("shared.weight"):
            found = [n for n in found if n in ("shared.weight", "model.shared.weight")]
        if len(found) == 1:
            return found[0]
    return None


def _candidates(source: str) -> list[str]:
    """Names under which the same matrix may appear: heads at the top level or beside the embedding's parents."""
    parents = source.split(".")[:-2]
    prefixes = ["", *(".".join(parents[:depth]) + "." for depth in range(1, len(parents) + 1))]
    endings = OUTPUT + (_ALSO_INPUT if source.endswith("shared.weight") else ())
    return [prefix + ending for prefix in prefixes for ending in endings]
