"""`pymerge.find_permutations`: which unit of one model is which unit of another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from pymerge.align.clusters import Clusters
from pymerge.align.groups import Spec
from pymerge.align.inputs import Model, opened, resolved_spec, seen_on
from pymerge.align.match import Match
from pymerge.align.permutations import Permutations
from pymerge.align.report import report_of, search_report
from pymerge.align.solve import Solver, unseen
from pymerge.align.sweeps import Options, Solution
from pymerge.align.weights import WeightSimilarity
from pymerge.align.zip import Zip
from pymerge.align.zip_search import ZipSolver
from pymerge.errors import InputError


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
    progress: Callable[[int, float], None] | None = None,
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
    memory   bytes of inner products kept between sweeps; what does not fit is computed again
    progress  called after every sweep with its number and the mean similarity so far
    Returns  Permutations or Clusters. `report`: alpha, seed, sweeps, assignments solved, mean similarity before and
             after, and under `groups` for each: units, and a list with one entry for each model but the first of units
             moved, similarity before and after with all groups where they are in the end, and gap (bound on how much
             more similarity an assignment could have reached, the others as they are; null: not known)
    Raises   InputError (models that differ in names or shapes, a spec that does not fit, alpha < 1 without batches),
             NonFinite (weights or activations with NaN, named)
    Cost     a forward pass a model and batch; a sweep: T - 1 products n^2 D for each group that a changed group
             touches, and its assignments, O(n^3) at worst. Memory: one parameter of two models in float32, T - 1
             matrices n^2 a group for the activations, and `memory`. With batches, models in folders are in memory while
             the batches run.
    Source   arXiv 2403.01753; weight matching: arXiv 2209.04836; zip: arXiv 2305.03053."""
    check_arguments(batches is not None, mode, alpha, start)
    options = Options(
        alpha=alpha if alpha is not None else 1.0 if batches is None else 0.5,
        max_sweeps=max_sweeps,
        patience=patience,
        seed=seed,
        threshold=threshold,
        progress=progress,
    )
    with opened(models) as inputs:
        groups = resolved_spec(spec, inputs[0], tie_heads and mode == "permute")
        seen = None if batches is None else seen_on(inputs, groups, batches, all_pairs=mode == "zip")
        known = {
            "spec": groups,
            "models": tuple(model.label for model in inputs),
            "fingerprints": tuple(model.weights.fingerprint() for model in inputs),
        }
        tensors = [model.weights for model in inputs]
        from_activations, cosine = seen is not None and start != "identity", similarity == "cosine"
        if mode == "zip":
            of_pairs = {} if seen is None else seen.all_scores()
            zipper = ZipSolver(groups, tensors, of_pairs, options, cosine=cosine, decay=zip_decay, budget=zip_budget)
            return zipped(zipper.run(from_activations), options, known)
        scores = [{} if seen is None else seen.scores(t) for t in range(1, len(inputs))]
        needed = options.alpha > 0 or any(unseen(group, of_model) for group in groups.groups for of_model in scores)
        weights = WeightSimilarity(groups, tensors, cosine=cosine, memory=memory) if needed else None
        solver = Solver(groups, weights, scores, options)
        return permuted(solver, solver.run(from_activations), known)


def permuted(solver: Solver, solution: Solution[Match], known: Mapping[str, Any]) -> Permutations:
    index = {
        group.name: {
            view: torch.stack([torch.arange(n), *(placed[group.name].index[view] for placed in solution.state)])
            for view, n in group.views().items()
        }
        for group in solver.spec.groups
    }
    return Permutations(index=index, report=report_of(solver, solution), **known)


def zipped(solution: Solution[Zip], options: Options, known: Mapping[str, Any]) -> Clusters:
    found = solution.state[0]
    report = search_report(options, solution) | {
        "after": sum(place.values[0] for place in found.values()) / len(found),
        "groups": {
            name: {"units": place.clusters.shape[1], "after": list(place.values)} for name, place in found.items()
        },
    }
    return Clusters(index={name: {"units": place.clusters} for name, place in found.items()}, report=report, **known)


def check_arguments(data: bool, mode: str, alpha: float | None, start: str | None) -> None:
    problems = []
    if mode not in ("permute", "zip"):
        problems.append(f"mode must be permute or zip, got {mode!r}")
    if alpha is not None and not 0 <= alpha <= 1:
        problems.append(f"alpha must be from 0 to 1, got {alpha}")
    if not data and alpha is not None and alpha < 1:
        problems.append(f"alpha = {alpha} needs activations: give batches, or leave alpha out")
    if start not in (None, "activations", "identity"):
        problems.append(f"start must be activations or identity, got {start!r}")
    if start == "activations" and not data:
        problems.append("start='activations' needs batches")
    if problems:
        raise InputError("find_permutations: " + "; ".join(problems))
