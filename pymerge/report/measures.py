"""What moments and spectra say: shares, angles and sizes. None where there is nothing to measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from statistics import fmean, median

import numpy as np

from pymerge.engine.moments import FIRST_OCTAVE, OCTAVES, Moments
from pymerge.report.spectra import Spectrum

Pair = tuple[int, int]
EDGES = (0.0, *(2.0 ** (FIRST_OCTAVE + b) for b in range(1, OCTAVES)))  # lower edges of the bins of magnitudes


def pairs(tasks: int) -> list[Pair]:
    return list(combinations(range(tasks), 2))


def square(tasks: int, of_pair: Callable[[Pair], float | None]) -> list[list[float | None]]:
    """[T][T], symmetric, with None on the diagonal."""
    values = {pair: of_pair(pair) for pair in pairs(tasks)}
    return [[values.get((min(s, t), max(s, t))) for t in range(tasks)] for s in range(tasks)]


def ratio(a: float, b: float) -> float | None:
    return float(a / b) if b else None


def average(values: Iterable[float | None]) -> float | None:
    """Mean of what there is."""
    found = [value for value in values if value is not None]
    return fmean(found) if found else None


def norms(m: Moments) -> list[float]:
    """||D_t||"""
    return [math.sqrt(value) for value in m.gram.diagonal()]


def relative_norms(m: Moments) -> list[float | None]:
    """||D_t|| / ||W||"""
    return [ratio(norm, math.sqrt(m.base)) for norm in norms(m)]


def changed(m: Moments) -> list[float]:
    """Share of entries that each model changes."""
    return [float(value) / max(1, m.entries) for value in m.both.diagonal()]


def cosine(m: Moments, pair: Pair) -> float | None:
    """Of the angle between two updates."""
    s, t = pair
    return ratio(m.gram[s, t], math.sqrt(m.gram[s, s] * m.gram[t, t]))


def opposed(m: Moments, pair: Pair) -> float | None:
    """Of the entries that both models change, the share that they change in opposite directions: 1/2 by chance."""
    return ratio(m.opposed[pair], m.both[pair])


def conflicted(m: Moments) -> float | None:
    """Of the entries that two models or more change, the share that one raises and another one lowers."""
    return ratio(m.conflicted, m.contested)


def cancelled(m: Moments) -> float | None:
    """Share of all updates' magnitude that their sum loses to opposite signs: 1 - sum |sum_t D_t| / sum_t sum |D_t|."""
    lost = ratio(m.l1_of_sum, float(m.l1.sum()))
    return None if lost is None else max(0.0, 1.0 - lost)


def magnitude_below(m: Moments, task: int, share: float) -> float | None:
    """A power of two below which this share of the entries that the model changes lie: the upper edge of a bin.

    None where the model changes nothing, or the bin has no upper edge (entries from 1 on)."""
    counts = m.octaves[task].copy()
    counts[0] -= m.entries - int(m.both[task, task])  # entries that are not changed
    total = counts.sum()
    if total == 0:
        return None
    found = int(np.argmax(np.cumsum(counts) >= share * total))
    return EDGES[found + 1] if found + 1 < OCTAVES else None


def share_below(m: Moments, task: int, edge: float) -> float | None:
    """Share of the entries that the model changes by less than `edge`, which is one of EDGES."""
    counts = m.octaves[task]
    same = m.entries - int(m.both[task, task])
    return ratio(int(counts[: EDGES.index(edge)].sum()) - same, m.entries - same)


def overlap(spectra: Sequence[Spectrum], pair: Pair) -> float | None:
    """Mean over matrices of the mean squared cosine of the principal angles between two models' proven directions."""
    return average(spectrum.overlaps[pair].mean for spectrum in spectra)


def overlap_by_chance(spectra: Sequence[Spectrum], pair: Pair) -> float | None:
    """What `overlap` would be of random spaces of the same dimensions: j / m and j / n."""
    return average(
        spectrum.overlaps[pair].rank * (1 / spectrum.shape[0] + 1 / spectrum.shape[1]) / 2
        for spectrum in spectra
        if spectrum.overlaps[pair].rank
    )


def effective_rank(spectra: Sequence[Spectrum], task: int) -> float | None:
    """Mean over matrices."""
    return average(spectrum.effective_ranks[task] for spectrum in spectra)


def stable_rank(spectra: Sequence[Spectrum], task: int) -> float | None:
    """Mean over matrices."""
    return average(spectrum.stable_rank(task) for spectrum in spectra)


def certified(spectra: Sequence[Spectrum], task: int) -> float | None:
    """Median over matrices of how many leading directions are proven."""
    found = [spectrum.certified[task] for spectrum in spectra if spectrum.energy[task]]
    return float(median(found)) if found else None


def captured(spectra: Sequence[Spectrum], task: int) -> float | None:
    """Mean over matrices of the share of the squared norm in the singular values found."""
    return average(
        ratio(sum(value**2 for value in spectrum.values[task]), spectrum.energy[task]) for spectrum in spectra
    )
