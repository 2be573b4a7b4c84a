"""What the papers claim, as comparisons of recipes, and whether it holds here.

`expected` was written down before the first run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

from scipy import stats

from benchmarks.quality.recipes import RECIPES

LEVEL = 0.05  # two-sided, of a t-test paired over seeds: beyond it is noise
SETTINGS = {"default": "at the papers' defaults", "searched": "with the scale searched"}
HOLDS, FAILS, NOISE, OPEN = "holds", "does not hold here", "within the noise", "open: one seed has no error"
BEST = "the best other data-free method"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Each of `chain` is better than the next one."""

    text: str
    paper: str
    chain: tuple[str, ...]
    expected: str


def improves(step: str, method: str, paper: str, expected: str) -> Claim:
    chain = (f"{method} + {step}" if step == "SVC" else f"{step} + {method}", method)
    return Claim(text=f"{step} improves {method}", paper=paper, chain=chain, expected=expected)


SVC, PAVE, ESM, ESMPP, ACE = "2602.05536", "2510.14697", "2602.20208", "2606.19164", "2603.02945"
CLAIMS = (
    improves("SVC", "TA", SVC, "holds; by less where the scale is searched, as part of SVC's effect is one of scale"),
    improves("SVC", "TIES", SVC, "holds; as for TA"),
    improves("SVC", "DARE", SVC, "holds; as for TA"),
    improves("SVC", "TSV-M", SVC, "within the noise: 0.8 points in the paper, with alpha 1"),
    improves("SVC", "Iso-C", SVC, "within the noise: 1.5 points in the paper"),
    improves("PAVE", "TA", PAVE, "within the noise: of 64 to 384 directions one to twelve are taken out"),
    improves("PAVE", "TIES", PAVE, "within the noise; as for TA"),
    improves(
        "PAVE", "EMR", PAVE, "does not hold: EMR is near the individual models, an eighth of the directions is lost"
    ),
    Claim(text="ESM > TSV-M", paper=ESM, chain=("ESM", "TSV-M"), expected="holds in vision, its authors' ground"),
    Claim(text="TSV-M > TIES", paper=ESM, chain=("TSV-M", "TIES"), expected="holds"),
    Claim(text="TIES > TA", paper=ESM, chain=("TIES", "TA"), expected="holds at defaults, not with the scale searched"),
    Claim(
        text="ESM > TSV-M > TIES > TA",
        paper=ESM,
        chain=("ESM", "TSV-M", "TIES", "TA"),
        expected="not everywhere; see its parts",
    ),
    Claim(text="ESM++ > ESM", paper=ESMPP, chain=("ESM++", "ESM"), expected="holds: it keeps a part of each task"),
    Claim(
        text="ACE best among data-free",
        paper=ACE,
        chain=("ACE", BEST),
        expected="within the noise of Iso-C, Iso-CTS and TSV-M",
    ),
)


def normalised(family: dict[str, Any], recipe: str, setting: str) -> dict[str, float]:
    """Seed -> mean over tasks of the score relative to the individual model's, in percent; 100 is as good. Seeds whose
    merge failed are left out."""
    return {
        seed: 100 * fmean(relative(family, seed, row[setting]).values())
        for seed, row in family["rows"].get(recipe, {}).items()
        if "failed" not in row
    }


def relative(family: dict[str, Any], seed: str, scores: dict[str, float]) -> dict[str, float]:
    """Task -> score / individual model's, the other way round where lower is better."""
    own = family["seeds"][seed]["individual"]["test"]
    higher = family["higher_is_better"]
    return {task: score / own[task] if higher else own[task] / score for task, score in scores.items()}


def spread(sample: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None for the error of one."""
    return fmean(sample), (variance(sample) / len(sample)) ** 0.5 if len(sample) > 1 else None


def judged(samples: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Differences in points, one sample a family: the mean of the families' means, its standard error from the spread
    within families, two-sided p of the t-test, and what that says."""
    points = fmean(map(fmean, samples))
    freedom = sum(len(sample) - 1 for sample in samples)
    if any(len(sample) < 2 for sample in samples):
        return {"points": points, "error": None, "p": None, "verdict": OPEN}
    error = sum(variance(sample) / len(sample) for sample in samples) ** 0.5 / len(samples)
    t = points / error if error else float("inf") * points if points else 0.0
    p = 2 * float(stats.t.sf(abs(t), freedom))
    return {
        "points": points,
        "error": error,
        "p": p,
        "verdict": NOISE if p >= LEVEL else HOLDS if points > 0 else FAILS,
    }


def opponent(families: Sequence[dict[str, Any]], setting: str) -> str:
    """The best data-free recipe but ACE's, chosen by the test split: to ACE's disadvantage."""
    others = [recipe.name for recipe in RECIPES if recipe.data_free and recipe.method != "ace"]
    means = {}
    for name in others:
        found = [normalised(family, name, setting) for family in families]
        if all(found):
            means[name] = fmean(fmean(values.values()) for values in found)
    return max(means, key=means.__getitem__) if means else BEST


def step(families: Sequence[dict[str, Any]], better: str, worse: str, setting: str) -> dict[str, Any] | None:
    """Whether `better` is better than `worse` in these families together; None where either was not run."""
    if not families:
        return None
    worse = opponent(families, setting) if worse == BEST else worse
    samples = []
    for family in families:
        first, second = normalised(family, better, setting), normalised(family, worse, setting)
        samples.append([first[seed] - second[seed] for seed in first if seed in second])
    if not all(samples):
        return None
    return {"better": better, "worse": worse} | judged(samples)


def verdict(claim: Claim, families: Sequence[dict[str, Any]], setting: str) -> dict[str, Any] | None:
    """A chain holds if all of its steps do, fails if one does; points and error are of its first and last."""
    steps = [step(families, *pair, setting) for pair in zip(claim.chain, claim.chain[1:], strict=False)]
    whole = step(families, claim.chain[0], claim.chain[-1], setting)
    if whole is None or any(found is None for found in steps):
        return None
    said = [found["verdict"] for found in steps if found]
    return whole | {"verdict": next((word for word in (FAILS, OPEN, NOISE) if word in said), HOLDS)}


def verdicts(families: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every claim in every setting, for each family and, under "all", for them together."""
    groups = {name: [family] for name, family in families.items()} | {"all": list(families.values())}
    return [
        {
            "claim": claim.text,
            "paper": claim.paper,
            "expected": claim.expected,
            "setting": setting,
            "found": {name: verdict(claim, group, setting) for name, group in groups.items()},
        }
        for claim in CLAIMS
        for setting in SETTINGS
    ]
