"""Which tensors of a model have a row for each token, and where its config says how many tokens there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pymerge.checkpoint import Checkpoint, safe_name
from pymerge.checkpoint.header import name_list
from pymerge.checkpoint.tied import INPUT, OUTPUT, TEXT_CONFIGS
from pymerge.errors import VocabMismatch

# Endings of names in transformers: embeddings, heads, and the biases of heads.
NAMES = (
    *INPUT,
    *OUTPUT,
    *"token_embedding.weight word_embedding.weight embeddings.weight output_layer.weight".split(),
    *"vocab_projector.weight generator_lm_head.weight predictions.decoder.weight lm_loss.weight".split(),
    *"lm_head.bias embed_out.bias predictions.bias predictions.decoder.bias lm_head.decoder.bias".split(),
    *"vocab_projector.bias generator_lm_head.bias lm_loss.bias proj_out.bias".split(),
)
# Other tensors whose name says one of these and that have as many entries along an axis may be of the vocabulary too.
HINTS = ("embed", "vocab", "head", "logit", "token")
NOT_TOKENS = ("position", "token_type", "patch", "norm")
SIZES = ("vocab_size", *(f"{part}.vocab_size" for part in TEXT_CONFIGS))


def vocabulary_tensors(model: Checkpoint, label: str) -> tuple[list[str], int]:
    """Names of the tensors whose axis 0 is the vocabulary, and its size: that of the config, or of all these tensors.

    Raises   VocabMismatch where it cannot be told"""
    named = [name for name in model if is_named(name)]
    told = config_sizes(model.config)
    sizes = {value for value in told.values() if any(has(model, name, value) for name in named)}
    if not named:
        sizes = set(told.values())
    elif not told:
        sizes = {model[name].shape[0] for name in named if len(model[name].shape) in (1, 2)}
    if len(sizes) != 1:
        found = ", ".join(f"{safe_name(name)} {list(model[name].shape)}" for name in named[:5]) or "none"
        raise VocabMismatch(
            f"{label}: its embedding cannot be told: tensors named like one: {found}; config.json says "
            f"{told or 'nothing'}. A tokenizer of the recipe needs one size for all of them"
        )
    (size,) = sizes
    return [name for name in named if has(model, name, size)], size


def is_named(name: str) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in NAMES)


def has(model: Checkpoint, name: str, size: int) -> bool:
    return model[name].shape[:1] == (size,)


def check_others(model: Checkpoint, label: str, tensors: Sequence[str], size: int) -> None:
    """Refuses other rows for a model where they are not sure to be given to all tensors that need them.

    Raises   VocabMismatch: there are none, or others may be of the vocabulary too"""
    if not tensors:
        raise VocabMismatch(f"{label}: which tensors hold its {size} tokens cannot be told by their names")
    doubtful = [
        f"{safe_name(name)} {list(model[name].shape)}"
        for name in model
        if name not in tensors
        and (
            "embed_tokens" in name
            or name.endswith(("lm_head.weight", "wte.weight", "word_embeddings.weight"))
            or (size in model[name].shape and looks_like_one(name))
        )
    ]
    if doubtful:
        raise VocabMismatch(
            f"{label}: {name_list(doubtful)} may be of its {size} tokens, which pymerge does not know: their rows "
            "cannot be put in the order of another vocabulary. Leave the tokenizer keys out of the recipe"
        )


def looks_like_one(name: str) -> bool:
    return any(hint in name for hint in HINTS) and not any(part in name for part in NOT_TOKENS)


def config_sizes(config: Mapping[str, Any] | None) -> dict[str, int]:
    """Dotted key -> vocabulary size that a config says there."""
    found: dict[str, int] = {}
    for key in SIZES:
        part: Any = config or {}
        for step in key.split("."):
            part = part.get(step) if isinstance(part, Mapping) else None
        if isinstance(part, int) and not isinstance(part, bool):
            found[key] = part
    return found


def size_changes(config: Mapping[str, Any] | None, old: int, new: int) -> dict[str, int]:
    """What of a config changes with its vocabulary."""
    if config is None or old == new:
        return {}
    keys = [key for key, value in config_sizes(config).items() if value == old]
    inner = "text_config.vocab_size" if isinstance(config.get("text_config"), Mapping) else "vocab_size"
    return dict.fromkeys(keys or [inner], new)
