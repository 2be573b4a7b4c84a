"""Finds the family of a model by its config or by name, and has it make the spec."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

from pymerge.align.groups import Spec
from pymerge.errors import InputError


class Family(Protocol):
    """Makes a spec from the shapes of all floating parameters and the config (empty where there is none)."""

    def __call__(self, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], *, tie_heads: bool) -> Spec: ...


DECODERS = (
    "llama mistral mixtral qwen2 qwen3 qwen2_moe qwen3_moe gemma gemma2 gemma3_text olmo2 olmo3 olmoe opt phi "
    "starcoder2 granite smollm3 stablelm cohere cohere2 seed_oss"
)
# Family -> its module here, which has a function `spec`, and the model types (transformers) that it serves.
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "decoder": ("decoder", tuple(DECODERS.split())),
    "bert": ("bert", ("bert", "roberta", "xlm-roberta", "camembert")),
    "gpt2": ("gpt2", ("gpt2",)),
    "gpt_neox": ("gpt_neox", ("gpt_neox",)),
    "vit": ("vit", ("vit", "deit")),
    "clip": ("clip", ("clip", "clip_vision_model", "clip_text_model")),
    "resnet": ("resnet", ("resnet",)),
    "chain": ("chain", ("vgg", "mlp")),
}
FLOATING = ("F64", "F32", "F16", "BF16")


def families() -> dict[str, tuple[str, ...]]:
    """Names that `spec_for` knows, each with the model types that it is taken for."""
    return {name: types for name, (_, types) in FAMILIES.items()}


def spec_for(
    names_and_shapes: Mapping[str, Sequence[int]],
    config: Mapping[str, Any] | None = None,
    name: str | None = None,
    *,
    tie_heads: bool = True,
) -> Spec:
    """The permutation groups of a model.

    names_and_shapes   of all floating parameters, named as in the checkpoint (`floating_shapes`), in any order
    config             config.json: its model_type picks the family, its numbers of heads cannot be told from shapes
    name               a family or a model type, where the config does not say or is not to decide
    tie_heads          False: q and k of a layer in one group, v in another, as the released code of MuDSC has it; their
                       head orders may then differ, which changes the function
    Raises             InputError: no such family; parameters that the spec does not cover; what the config lacks"""
    family = family_of(config or {}, name)
    make: Family = import_module(f"pymerge.align.specs.{FAMILIES[family][0]}").spec
    return make(dict(sorted(names_and_shapes.items())), config or {}, tie_heads=tie_heads)


def family_of(config: Mapping[str, Any], name: str | None) -> str:
    by_type = {model_type: family for family, types in families().items() for model_type in types}
    asked = name if name is not None else config.get("model_type")
    if asked is None:
        raise InputError(
            "which architecture is it? config.json has no model_type; say it by spec (on the command line --spec), one "
            f"of {', '.join(FAMILIES)}"
        )
    family = asked if asked in FAMILIES else by_type.get(asked)
    if family is None:
        known = [*FAMILIES, *by_type]
        close = difflib.get_close_matches(str(asked), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise InputError(
            f"no permutation groups for {asked!r}{hint} Known: {', '.join(dict.fromkeys(known))}. By the name "
            "'decoder' any model that calls its modules as Llama does is tried; what that cannot place is an error"
        )
    return family


def floating_shapes(model: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all floating tensors of an open checkpoint or of a state dict."""

    def floating(tensor: Any) -> bool:
        return tensor.dtype in FLOATING if isinstance(tensor.dtype, str) else tensor.dtype.is_floating_point

    return {name: tuple(tensor.shape) for name, tensor in model.items() if floating(tensor)}
