"""Names in a checkpoint and in the module that transformers makes of it: its version 5 renames some on loading."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def stored_names(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Parameter of the module -> tensor of the checkpoint that it is loaded from; those that are loaded as they are."""
    stored = list(stored)
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # before version 5: nothing is renamed
        return {name: name for name in stored}
    transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
    prefix, known = getattr(model, "base_model_prefix", None), model.state_dict()
    found = {}
    for name in stored:
        renamed, converted = rename_source_key(name, renamings, converters, prefix, known)  # type: ignore[arg-type]
        if converted is None:
            found[renamed] = name
    return found


def stored_module(module: str, names: dict[str, str]) -> str:
    """What a module is called in the checkpoint: by its weight's name there."""
    for suffix in (".weight", ".in_proj_weight"):
        if (stored := names.get(module + suffix)) is not None and stored.endswith(suffix):
            return stored.removesuffix(suffix)
    return module
