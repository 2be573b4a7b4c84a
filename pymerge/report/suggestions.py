"""What an inspection suggests: a table of rules, each with its threshold, its reason and where that comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from statistics import median
from typing import TYPE_CHECKING, Literal

from pymerge.report import measures
from pymerge.report.spectra import HELD

if TYPE_CHECKING:
    from pymerge.report.inspection import Inspection

Measured = Iterator[tuple[float, dict[str, object]]]  # a value, and what the advice says beside it
SMALL = 2.0**-9  # of an entry's change: 0.00195
COMPARED = 3  # models from which an outlier can be told


@dataclass(frozen=True)
class Rule:
    """Where `measure` gives a value at or beyond the threshold, `advice` is given.

    advice   {value}, {threshold} and what the measure says beside the value are filled in
    reason   why, and source: whose result that is"""

    name: str
    measure: Callable[[Inspection], Measured]
    is_at: Literal["least", "most"]
    threshold: float
    advice: str
    reason: str
    source: str

    def fires(self, value: float) -> bool:
        return value >= self.threshold if self.is_at == "least" else value <= self.threshold


@dataclass(frozen=True)
class Suggestion:
    """What one rule says of these models."""

    rule: str
    text: str
    value: float
    threshold: float
    reason: str
    source: str


def pair_names(found: Inspection, pair: measures.Pair) -> dict[str, object]:
    return {"a": found.models[pair[0]], "b": found.models[pair[1]]}


def shared_subspace(found: Inspection) -> Measured:
    """Mean overlap of proven directions above what chance gives, over all pairs."""
    group, over = found.whole, []
    for pair in measures.pairs(len(found.models)):
        overlap, chance = (f(group.spectra, pair) for f in (measures.overlap, measures.overlap_by_chance))
        if overlap is not None and chance is not None and chance < 1:
            over.append((overlap - chance) / (1 - chance))
    if over:
        yield sum(over) / len(over), {}


def sign_conflict(found: Inspection) -> Measured:
    """Share of contested entries that are opposed, over all pairs together."""
    m, pairs = found.whole.moments, measures.pairs(len(found.models))
    rate = measures.ratio(sum(int(m.opposed[p]) for p in pairs), sum(int(m.both[p]) for p in pairs))
    if rate is not None:
        yield rate, {"lost": measures.cancelled(m) or 0.0}


def cosine(found: Inspection) -> Measured:
    """Of each pair of updates."""
    for pair in measures.pairs(len(found.models)):
        value = measures.cosine(found.whole.moments, pair)
        if value is not None:
            yield value, pair_names(found, pair)


def mean_cosine(found: Inspection) -> Measured:
    values = [value for value, _ in cosine(found)]
    if values:
        yield sum(values) / len(values), {}


def outlier_norm(found: Inspection) -> Measured:
    """Norm of each model's update over the median of the others'."""
    norms = measures.norms(found.whole.moments)
    for t, norm in enumerate(norms if len(norms) >= COMPARED else ()):
        others = median(norms[:t] + norms[t + 1 :])
        if others:
            yield norm / others, {"model": found.models[t]}


def unchanged_model(found: Inspection) -> Measured:
    for t, norm in enumerate(measures.norms(found.whole.moments)):
        yield norm, {"model": found.models[t]}


def untouched(found: Inspection) -> Measured:
    """Tensors that no model changes; silent where a model changes nothing at all."""
    names = found.untouched()
    if len(names) < len(found.tensors):
        yield len(names), {"of": len(found.tensors)}


def low_rank(found: Inspection) -> Measured:
    """Largest rank over the matrices of a model that holds 95 % of an update, against their smaller side."""
    spectra = found.whole.spectra
    for t, model in enumerate(found.models):
        held = [(s.ranks_held[t], min(s.shape), len(s.values[t])) for s in spectra if s.energy[t]]
        if held and all(rank <= known for rank, _, known in held):
            rank = max(rank for rank, _, _ in held)
            yield max(r / side for r, side, _ in held), {"model": model, "rank": rank, "share": f"{HELD:.0%}"}


def sparse(found: Inspection) -> Measured:
    """Share of entries that each model changes."""
    for t, share in enumerate(measures.changed(found.whole.moments)):
        if share:
            yield share, {"model": found.models[t], "density": max(0.01, ceil(share * 100) / 100)}


def small_changes(found: Inspection) -> Measured:
    """Share of the changed entries that change by less than 0.002, of the model with the fewest of them."""
    shares = [measures.share_below(found.whole.moments, t, SMALL) for t in range(len(found.models))]
    known = [share for share in shares if share is not None]
    if known:
        yield min(known), {}


def shallow(found: Inspection) -> Measured:
    """Mean relative norm of the first third of a stack's layers over that of the last."""
    stacks: dict[str, list[float]] = {}
    for (stack, _), group in found.layers.items():
        size = measures.average(measures.relative_norms(group.moments))
        if size is not None:
            stacks.setdefault(stack, []).append(size)
    for stack, sizes in stacks.items():
        third = len(sizes) // 3
        if third and sum(sizes[-third:]):
            yield sum(sizes[:third]) / sum(sizes[-third:]), {"stack": stack}


RULES = (
    Rule(
        "shared subspace",
        shared_subspace,
        "least",
        0.3,
        "The leading directions of the models overlap ({value:.2f} above chance, on a scale from 0 to 1): a sum counts "
        "them once a model. Add `calibrate: svc`.",
        "what tasks share is added up several times in the merged singular values",
        "SVC, arXiv 2602.05536",
    ),
    Rule(
        "sign conflict",
        sign_conflict,
        "least",
        0.4,
        "Of the entries that two models change, {value:.0%} are changed in opposite directions (half is chance); the "
        "sum of all updates loses {lost:.0%} of their magnitude. `ties` elects a sign for each entry.",
        "entries of opposite signs cancel where they are averaged",
        "TIES, arXiv 2306.01708",
    ),
    Rule(
        "opposed models",
        cosine,
        "most",
        -0.1,
        "{a} and {b} move the weights against each other (cosine {value:.2f}): each undoes some of the other in any "
        "sum. Merge them apart, or weigh one down.",
        "updates of different tasks are nearly orthogonal as a rule; interference grows with their overlap",
        "task arithmetic, arXiv 2212.04089",
    ),
    Rule(
        "aligned models",
        mean_cosine,
        "least",
        0.5,
        "The updates point the same way (mean cosine {value:.2f}): their sum overshoots. Average them (`linear`, or "
        "`task_arithmetic` with weights that add up to 1), or `model_stock`.",
        "models of one task lie around a common centre, and their mean is nearer to it than each of them",
        "model soups, arXiv 2203.05482; Model Stock, arXiv 2403.19522",
    ),
    Rule(
        "outlier norm",
        outlier_norm,
        "least",
        3.0,
        "The update of {model} is {value:.1f} times as large as the median of the others: it decides any unweighted "
        "sum. Give it a smaller weight.",
        "a sum follows its largest term; coefficients of task vectors are there to balance them",
        "task arithmetic, arXiv 2212.04089",
    ),
    Rule(
        "model unchanged",
        unchanged_model,
        "most",
        0.0,
        "{model} is the base: leave it out, it only thins out averages.",
        "its task vector is zero",
        "definition of the task vector, arXiv 2212.04089",
    ),
    Rule(
        "untouched tensors",
        untouched,
        "least",
        1,
        "{value:.0f} of {of} tensors are those of the base in all models. They need no method; parameter-efficient or "
        "frozen training leaves such.",
        "every combination of zero updates is the base",
        "definition of the task vector, arXiv 2212.04089",
    ),
    Rule(
        "low rank",
        low_rank,
        "most",
        0.25,
        "{share} of the update of {model} is in {rank} directions a matrix at most: `pymerge extract-lora {model} BASE "
        "-r {rank}` keeps nearly all of it, and adapters are merged by their factors.",
        "a truncated SVD is the best approximation of its rank, and says what it loses",
        "LoRA, arXiv 2106.09685; Eckart and Young 1936",
    ),
    Rule(
        "sparse update",
        sparse,
        "most",
        0.5,
        "{model} changes {value:.0%} of the entries: with `density: {density:.2f}` or more, `ties` and its kin drop "
        "nothing of it.",
        "trimming drops the smallest entries first, and these are zero",
        "TIES, arXiv 2306.01708",
    ),
    Rule(
        "small changes",
        small_changes,
        "least",
        0.99,
        "{value:.1%} of the changed entries change by less than 0.002: random dropping with rescaling (`dare` as a "
        "purify step, `dare_ties`) is known to work in this range.",
        "updates within 0.002 are redundant: 90 % of their entries could be dropped",
        "DARE, arXiv 2311.03099",
    ),
    Rule(
        "shallow layers",
        shallow,
        "least",
        1.25,
        "The first layers of {stack} change {value:.1f} times as much as the last: `calibrate: lines` keeps them "
        "nearer to the base.",
        "shallow layers hold what all tasks need, deep ones what tasks add",
        "LiNeS, arXiv 2410.17146",
    ),
)


def suggest(found: Inspection) -> Iterator[Suggestion]:
    """What the rules say, in the table's order."""
    for rule in RULES:
        for value, beside in rule.measure(found):
            if rule.fires(value):
                text = rule.advice.format(value=value, threshold=rule.threshold, **beside)
                yield Suggestion(rule.name, text, value, rule.threshold, rule.reason, rule.source)
