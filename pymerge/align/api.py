"""`pymerge.find_permutations`: which unit of one model is which unit of another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import torch

from pymerge.align.clusters import Clusters
from pymerge.align.groups import Spec
from pymerge.align.inputs import Model, activation_scores, opened, resolved_spec
from pymerge.align.permutations import Permutations
from pymerge.align.report import report_of
from pymerge.align.solve import Options, Solution, Solver
from pymerge.align.weights import WeightSimilarity
from pymerge.errors import InputError


@overload
def find_permutations(
    models: Sequence[Model],
    batches: Iterable[Any] | None = ...,
    *,
    mode: Literal["permute"] = ...,
    **options: Any,
) -> Permutations: ...


@overload
def find_permutations(
    models: Sequence[Model], batches: Iterable[Any] | None = ..., *, mode: Literal["zip"], **options: Any
) -> Clusters: ...


def find_permutations(
    models: Sequence[Model],
    batches: Iterable[Any] | None = None,
    *,
    spec: Spec | str | None = None,
    mode: Literal["permute", "zip"] = "permute",
    alpha: float | None = None,
    start: Literal["activations", "identity"] | None = None,
    similarity: Literal["correlation", "cosine"] = "correlation",
    max_sweeps: int = 100,
    patience: int = 5,
    seed: int = 0,
    tie_heads: bool = True,
    threshold: float = 1e-6,
    zip_decay: float = 0.5,
    zip_budget: float = 1.0,
    memory: int = 2_000_000_000,
) -> Permutations | Clusters:
    """Units of models that agree in their weights and in their activations (MuDSC), the first model as the anchor.

    models   at least two of one architecture: modules, Hugging Face folders or safetensors files, or state dicts
             (state dicts and files: weights only). Weights are read parameter by parameter
    batches  what every model is called with, as for `pymerge.observe`: mappings of keyword arguments
             (`attention_mask` says what is padding), tensors, or tuples of positional arguments. None: weights alone
    spec     the groups of units; the name of an architecture (pymerge.align.specs); None: by the model's config and
             names
    mode     "permute": one to one, preserves each model's function; returns Permutations. "zip": units of all models,
             of one model too, are put together as they agree; returns Clusters, whose `merged` averages them
    alpha    the weights' share of the similarity, 0 (activations alone, one solve) to 1 (weights alone);
             default 0.5, without batches 1
    start    of the sweeps: the permutations that the activations alone ask for (default with batches), or identity
    similarity  of weights: correlation, or cosine of the uncentred vectors. Activations are correlated
    max_sweeps, patience  sweeps over all groups at most, and how many in a row may bring nothing
    seed     of the order in which groups are visited; other orders may find other local optima
    tie_heads  one order of heads for q, k and v, as the function needs it; False: the released, independent ones
    threshold  a model's group stays as it is where permuting it gains less mean similarity
    zip_decay, zip_budget  a, b of the zip mode: a merged unit's similarity to others is a times the smaller one; share
             of the merges that may be within one model
    memory   of Gram matrices kept between sweeps; what does not fit is computed again
    Returns  Permutations, `report` for each group: units moved, similarity before and after, gap of the assignment
    Raises   InputError (models that differ in names or shapes, a spec that does not fit, alpha < 1 without batches),
             NonFinite (weights or activations with NaN, named)
    Cost     a forward pass a model and batch; a sweep: T - 1 products n^2 D for each group that a changed group
             touches, and its assignments, O(n^3) at worst. Memory: one parameter of two models in float32, T - 1
             matrices n^2 a group for the activations, and `memory`. With batches, models in folders are in memory while
             the batches run.
    Source   arXiv 2403.01753; weight matching: arXiv 2209.04836; zip: arXiv 2305.03053."""
    raise NotImplementedError
