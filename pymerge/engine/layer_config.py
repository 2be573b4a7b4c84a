"""What config.json says of layers, for an output that has others: their number, and lists with an entry a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pymerge.recipe.stacks import COUNT, COUNTS, INNER, OUTER

INDICES = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "cross_attention_layers")  # lists of layers' numbers
AHEAD = "num_nextn_predict_layers"  # stored behind the layers, numbered on: they predict tokens further ahead
NOT_LAYERS = ("token", "architectures", "_ids", "languages", "labels")  # in names of lists of other things


def own_layers(config: Mapping[str, Any] | None, stored: int) -> int:
    """How many of a stack's stored layers the model runs: not those of DeepSeek-V3 and its kin that predict ahead."""
    for place in OUTER:
        inner = _within(config or {}, place)
        ahead = inner.get(AHEAD)
        if type(ahead) is int and ahead > 0 and any(inner.get(key) == stored - ahead for key in COUNT):
            return stored - ahead
    return stored


def layer_changes(
    config: Mapping[str, Any], kind: str, layers: int, taken: Sequence[tuple[Mapping[str, Any], int]]
) -> dict[str, Any]:
    """What changes in the config of a model that stores `layers` layers in the module `kind`: dotted key -> value.
    Empty: it does not say how many there are.

    taken  of each layer of the output, the config of the model that it is from, and its place in that model"""
    changes: dict[str, Any] = {}
    for place in INNER.get(kind, OUTER):
        inner = _within(config, place)
        known = [key for key in COUNTS.get(kind, COUNT) if type(inner.get(key)) is int]
        if not known:
            continue
        dot = f"{place}." if place else ""
        changes |= {f"{dot}{key}": len(taken) for key in known}
        if own_layers(config, layers) < layers:
            changes[f"{dot}{AHEAD}"] = 0  # they fit behind the model's own last layer only
        counts = {layers, *(inner[key] for key in known)}
        for key, value in inner.items():
            if not isinstance(value, list) or not value or any(word in key for word in NOT_LAYERS):
                continue
            sources = [(_within(of, place).get(key), index) for of, index in taken]
            if key in INDICES and all(type(index) is int for index in value):
                changes[f"{dot}{key}"] = [
                    i for i, (of, index) in enumerate(sources) if isinstance(of, list) and index in of
                ]
            elif len(value) in counts and len(value) > 1:
                changes[f"{dot}{key}"] = [_entry(of, index, value) for of, index in sources]
    return changes


def lists_layers(changes: Mapping[str, Any]) -> bool:
    """Whether the config says layer by layer what they are."""
    return any(isinstance(value, list) for value in changes.values())


def _within(config: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    inner = config.get(place) if place else config
    return inner if isinstance(inner, Mapping) else {}


def _entry(values: Any, index: int, instead: Sequence[Any]) -> Any:
    """What a model's list says of one of its layers; where it has no such list, what the output's own does."""
    own = values if isinstance(values, list) and index < len(values) else instead
    return own[index] if index < len(own) else own[-1]
