"""All models of a recipe in the reference's layout of experts (fused, or a tensor for each), as they are read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from pymerge.checkpoint import Checkpoint
from pymerge.checkpoint.expert_layouts import Mapper
from pymerge.engine.check import Problems

if TYPE_CHECKING:
    from pymerge.engine.local import Inputs


def with_layouts(inputs: Inputs) -> Inputs:
    """The inputs with experts stored as the base stores them (without one, as the first model does).

    Raises   InputError, MissingTensor, ShapeMismatch: experts that cannot be read so; all of them in one message."""
    reference = inputs.reference
    if not has_experts(reference):
        return inputs
    views: dict[int, Checkpoint] = {id(reference): reference}
    problems = Problems()

    def viewed(model: Checkpoint, label: str) -> Checkpoint:
        if id(model) not in views and same_shapes(reference, model):
            views[id(model)] = model
        if id(model) not in views:
            mapper = Mapper(reference, model, label)
            views[id(model)] = mapper.run()
            problems.found += mapper.problems.values()
        return views[id(model)]

    models = tuple(viewed(*found) for found in zip(inputs.models, inputs.labels, strict=True))
    of_fisher = [f"Fisher information of {label}" for label in inputs.labels]
    fisher = tuple(viewed(*found) for found in zip(inputs.fisher, of_fisher, strict=False))
    problems.raise_all()
    return replace(inputs, models=models, fisher=fisher)


def same_shapes(reference: Checkpoint, model: Checkpoint) -> bool:
    return reference.keys() == model.keys() and all(reference[name].shape == model[name].shape for name in reference)


def has_experts(names: Iterable[str]) -> bool:
    return any(".experts." in name or ".block_sparse_moe." in name for name in names)
