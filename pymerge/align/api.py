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
from pymerge.align.solve import Scores, Solver, unseen
from pymerge.align.sweeps import Options, Solution
from pymerge.align.weights import WeightSimilarity
from pymerge.align.zip import Zip
from pymerge.align.zip_search import ZipSolver
from pymerge.checkpoint import Checkpoint
from pymerge.errors import InputError

WORDS = {
    "mode": ("permute", "zip"),
    "start": ("activations", "identity"),
    "similarity": ("correlation", "cosine"),
}
LIMITS = {  # least and largest
    "alpha": (0.0, 1.0),
    "max_sweeps": (1, 1_000_000),
    "patience": (1, 1_000_000),
    "zip_decay": (1e-6, 1.0),
    "zip_budget": (0.0, 1.0),
}


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

    models   at least two of one architecture: modules, Hugging Face folders, or, for weights alone, safetensors files
             and state dicts. Weights are read parameter by parameter
    batches  what every model is called with, as for `pymerge.observe`: mappings of keyword arguments
             (`attention_mask` says what is padding), tensors, or tuples of positional arguments. None: weights alone
    spec     the groups of units; the name of an architecture (pymerge.align.specs); None: by the model's config and
             names
    mode     "permute": one to one, preserves each model's function; returns Permutations. "zip": units of all models,
             of one model too, are put together as they agree (no heads in one order, no experts); returns Clusters
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
             touches, and its assignments, O(n^3) at worst. Memory, in float32: T - 1 matrices n^2 of each group for
             its activations, four n^2 of the group that is matched, one parameter of two models as stored and 128 MB of
             them widened, and `memory`; zip: (T n)^2 for n^2, a parameter of all models. With batches, models in
             folders are in memory while the batches run.
    Source   arXiv 2403.01753; weight matching: arXiv 2209.04836; zip: arXiv 2305.03053."""
    share = alpha if alpha is not None else 1.0 if batches is None else 0.5
    begin = start if start is not None else "identity" if batches is None else "activations"
    check_arguments(
        batches is not None,
        words={"mode": mode, "start": begin, "similarity": similarity},
        numbers={
            "alpha": share,
            "max_sweeps": max_sweeps,
            "patience": patience,
            "zip_decay": zip_decay,
            "zip_budget": zip_budget,
        },
    )
    options = Options(
        alpha=share, max_sweeps=max_sweeps, patience=patience, seed=seed, threshold=threshold, progress=progress
    )
    from_activations, cosine = begin == "activations", similarity == "cosine"
    with opened(models) as inputs:
        groups = resolved_spec(spec, inputs[0], tie_heads and mode == "permute")
        seen = None if batches is None else seen_on(inputs, groups, batches, all_pairs=mode == "zip")
        known = {
            "spec": groups,
            "models": tuple(model.label for model in inputs),
            "fingerprints": tuple(model.weights.fingerprint() for model in inputs),
        }
        tensors = [model.weights for model in inputs]
        if mode == "zip":
            of_pairs = {} if seen is None else seen.all_scores()
            zipper = ZipSolver(groups, tensors, of_pairs, options, cosine=cosine, decay=zip_decay, budget=zip_budget)
            return zipped(zipper.run(from_activations), options, known)
        scores = [{} if seen is None else seen.scores(t) for t in range(1, len(inputs))]
        solver = Solver(groups, weights_for(groups, tensors, scores, share, cosine, memory), scores, options)
        return permuted(solver, solver.run(from_activations), known)


def weights_for(
    spec: Spec,
    models: Sequence[Checkpoint],
    activations: Sequence[Mapping[str, Scores]],
    alpha: float,
    cosine: bool,
    memory: int,
) -> WeightSimilarity | None:
    """None where activations say all."""
    if alpha == 0 and not any(unseen(group, of_model) for group in spec.groups for of_model in activations):
        return None
    return WeightSimilarity(spec, models, cosine=cosine, memory=memory)


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


def check_arguments(data: bool, words: Mapping[str, str], numbers: Mapping[str, float]) -> None:
    """words, numbers: arguments with one of WORDS, or a least and a largest value in LIMITS."""
    problems = [
        f"{name} must be {' or '.join(WORDS[name])}, got {word!r}"
        for name, word in words.items()
        if word not in WORDS[name]
    ]
    problems += [
        f"{name} must be from {LIMITS[name][0]} to {LIMITS[name][1]}, got {number}"
        for name, number in numbers.items()
        if not LIMITS[name][0] <= number <= LIMITS[name][1]
    ]
    if not data and numbers["alpha"] < 1:
        problems.append(f"alpha = {numbers['alpha']} needs activations: give batches, or leave alpha out")
    if not data and words["start"] == "activations":
        problems.append("start = 'activations' needs batches")
    if problems:
        raise InputError("find_permutations: " + "; ".join(problems))
