"""Opened models whose embeddings and heads have the rows of another vocabulary: gathered as they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from pymerge.checkpoint import AnyTensor, Checkpoint, safe_name
from pymerge.checkpoint.header import name_list
from pymerge.checkpoint.moved import MovedTensor
from pymerge.checkpoint.rows import Rows, RowsTensor
from pymerge.checkpoint.tied import tied_pairs
from pymerge.errors import MissingTensor, ShapeMismatch, VocabMismatch
from pymerge.vocabulary.plan import RowPlan
from pymerge.vocabulary.tensors import check_others, is_named


def with_rows(
    models: Sequence[Checkpoint],
    labels: Sequence[str],
    names: Sequence[Sequence[str]],
    sizes: Sequence[int],
    plans: Sequence[RowPlan],
    pad: int,
) -> list[Checkpoint]:
    """The models with the rows that are planned; names: of the vocabulary tensors of each; pad: rows behind, which are
    the mean of the others. A tensor that several models share, with the same rows, stays one that they share.

    Raises   VocabMismatch, ShapeMismatch, MissingTensor"""
    tied = [tied_pairs(model) for model in models]
    made: dict[Any, AnyTensor] = {}
    views = []
    for k, (model, plan) in enumerate(zip(models, plans, strict=True)):
        if not pad and plan.keeps(k, sizes[k]):
            views.append(model)
            continue
        check_others(model, labels[k], names[k], sizes[k])
        changed = {}
        for name in names[k]:
            parts = [
                Rows(source_of(name, model[name], j, models, tied, labels), share.places, share.index)
                for share in plan.shares
                for j in (share.model,)
            ]
            key = (id(model[name]), *(piece for part in parts for piece in identity(part)))
            if key not in made:
                made[key] = RowsTensor(model[name], parts, plan.tokens, pad)
            changed[name] = made[key]
        views.append(model.viewed({name: changed.get(name, model[name]) for name in model.file_order()}))
    return views


def identity(part: Rows) -> tuple[int, bytes]:
    digest = hashlib.blake2b(part.places.tobytes(), digest_size=16)
    digest.update(part.index.tobytes())
    return id(part.source), digest.digest()


def source_of(
    name: str,
    like: AnyTensor,
    j: int,
    models: Sequence[Checkpoint],
    tied: Sequence[Mapping[str, str]],
    labels: Sequence[str],
) -> AnyTensor:
    """The tensor of model j that corresponds to `name`: of a tied head the embedding."""
    held = name if name in models[j] else tied[j].get(name)
    if held is None:
        raise MissingTensor(
            f"{safe_name(name)}: absent from {labels[j]}, whose rows other models need for their tokens"
        )
    found = models[j][held]
    if found.shape[1:] != like.shape[1:]:
        raise ShapeMismatch(
            f"{safe_name(name)}: {labels[j]} is {list(found.shape)}, another model {list(like.shape)}: rows of one "
            "cannot stand in for rows of the other. Merge models of one width"
        )
    return found


def common_sizes(models: Sequence[Checkpoint], labels: Sequence[str]) -> list[int]:
    """Rows of each model's vocabulary tensors, where models differ in them; empty where none do."""
    shapes: dict[str, set[int]] = {}
    for model in models:
        for name in model:
            if is_named(name) and model[name].shape:
                shapes.setdefault(name, set()).add(model[name].shape[0])
    differing = [name for name, found in shapes.items() if len(found) > 1]
    sizes = []
    for model, label in zip(models, labels, strict=True) if differing else ():
        found = {model[name].shape[0] for name in differing if name in model}
        if len(found) != 1:
            raise VocabMismatch(f"{label}: {name_list(differing)}: of {sorted(found)} rows, one number is needed")
        sizes += found
    return sizes


def truncated(model: Checkpoint, size: int, rows: int) -> Checkpoint:
    """The first `rows` of the `size` rows of a model's vocabulary tensors."""
    import torch

    index = {0: torch.arange(rows)}
    held = [name for name in model if is_named(name) and model[name].shape[:1] == (size,) != (rows,)]
    moved = {name: MovedTensor(name, model[name], index) for name in held}
    return model.viewed({name: moved.get(name, model[name]) for name in model.file_order()}) if held else model
