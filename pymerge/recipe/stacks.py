"""What tensor names tell of a model: its stacks of layers, its modules, what comes before the layers and what behind.

Module names are mergekit's: encoder, decoder and shared of models that have both; text_decoder, vision_tower (or
vision_model) and multi_modal_projector of models that see; else default. Where a recipe names stacks of layers
(`model.encoder.layers`), those are the modules, and default is the rest.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from pymerge.recipe.layers import LAYER

_PROJECTOR = re.compile(r"(?:^|\.)(?:multi_modal_projector|mm_projector|merger|deepstack_merger_list)\.")
_VISION = re.compile(r"(?:^|\.)(vision_tower|vision_model|visual)\.")
_CODER = re.compile(r"^(?:\w+\.)?(encoder|decoder)\.")

# Words of names that are not in layers, outermost part first.
_HEADS = {"head", "classifier", "score", "pooler", "cls", "output", "outputs", "predictions", "logit", "vocab"}
_HEAD_PARTS = ("embed_out", "proj_out", "text_projection", "visual_projection")
_FRONT = {"wte", "wpe", "pos", "position", "positional", "rotary", "relative", "inv", "patch", "token", "pre"}
_FRONT_PARTS = ("conv1", "conv2")
_NORMS = {"norm", "layernorm", "layrnorm", "ln", "final", "post"}

COUNTS: Mapping[str, tuple[str, ...]] = {
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
    "vision_tower": ("num_hidden_layers", "depth", "num_layers"),
    "vision_model": ("num_hidden_layers", "depth", "num_layers"),
}  # keys of config.json for the number of a module's layers; of all others:
COUNT = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
INNER = {"vision_tower": ("vision_config",), "vision_model": ("vision_config",)}  # where they are; of all others:
OUTER = ("", "text_config", "llm_config", "language_config")


class LayerName(NamedTuple):
    """`stack`.`number`.`rest`"""

    stack: str
    number: int
    rest: str

    @classmethod
    def of(cls, name: str) -> LayerName | None:
        """None: in no layer."""
        found = LAYER.search(name)
        return cls(name[: found.start()], int(found[1]), name[found.end() :]) if found else None

    def at(self, number: int) -> str:
        """The name in another layer."""
        return f"{self.stack}.{number}.{self.rest}"


def stacks_of(names: Iterable[str]) -> dict[str, int]:
    """Stack -> how many layers it has."""
    found: dict[str, int] = {}
    for name in map(LayerName.of, names):
        if name is not None:
            found[name.stack] = max(found.get(name.stack, 0), name.number + 1)
    return found


def kinds_of(names: Collection[str]) -> dict[str, str]:
    """Tensor name -> its module, by what modules are usually called."""
    coders = {found[1] for stack in stacks_of(names) if (found := _CODER.match(f"{stack}."))}
    sees = any(map(_VISION.search, names))
    rest = "shared" if len(coders) == 2 else "text_decoder" if sees else "default"

    def kind(name: str) -> str:
        if _PROJECTOR.search(name) and sees:
            return "multi_modal_projector"
        if found := _VISION.search(name):
            return "vision_model" if found[1] == "vision_model" else "vision_tower"
        found = _CODER.match(name) if len(coders) == 2 else None
        return found[1] if found else rest

    return {name: kind(name) for name in names}


def modules_of(names: Collection[str], wanted: Sequence[str]) -> dict[str, str] | None:
    """Tensor name -> module, where all `wanted` are modules. None: some are none."""
    kinds = kinds_of(names)
    if set(wanted) <= set(kinds.values()):
        return kinds
    layers = {name: LayerName.of(name) for name in names}
    found = {name: layer.stack if layer else "default" for name, layer in layers.items()}
    return found if set(wanted) <= set(found.values()) else None


def known_modules(names: Collection[str]) -> list[str]:
    """The module names that a recipe may use."""
    return list(dict.fromkeys((*kinds_of(names).values(), *stacks_of(names))))


def comes_before(name: str) -> bool | None:
    """Whether a tensor that is in no layer comes before the layers (embeddings) or behind them (norms, heads). None:
    its name does not tell."""
    for part in name.split("."):
        words = set(part.lower().split("_"))
        if words & _HEADS and "token" not in words or part in _HEAD_PARTS:
            return False
        if words & _FRONT or part in _FRONT_PARTS or any(word.startswith("emb") for word in words):
            return True
        if words & _NORMS:
            return False
    return None
