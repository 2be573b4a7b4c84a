"""What the figures of `pairs.run` say: means, the claim's verdict, a table, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from benchmarks.quality.pairs import MODES, MUDSC, SINGLE

CLAIM = "MuDSC > single-space for different seeds"
LEVEL = 0.05  # two-sided, of a paired t-test: beyond it is noise


def title(cell: dict[str, Any]) -> str:
    return f"{cell['kind']}, {cell['tasks']}"


def values(cell: dict[str, Any], way: str, metric: str = "joint") -> list[float]:
    """Percent, one a pair."""
    return [100 * pair["ways"][way][metric] for pair in cell["pairs"]]


def spread(sample: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error. Raises ValueError for fewer than two pairs, which have none."""
    if len(sample) < 2:
        raise ValueError(f"{len(sample)} pairs have no standard error; at least 2 are needed")
    return fmean(sample), stdev(sample) / len(sample) ** 0.5


def opponent(cell: dict[str, Any], prefix: str) -> str:
    """The single space with the higher mean: chosen by the test images, to MuDSC's disadvantage."""
    return max((prefix + name for name in SINGLE), key=lambda way: fmean(values(cell, way)))


def differences(cell: dict[str, Any], prefix: str, way: str) -> list[float]:
    """Points of joint accuracy that a MuDSC is ahead of the better single space, one a pair."""
    single = values(cell, opponent(cell, prefix))
    return [own - other for own, other in zip(values(cell, prefix + way), single, strict=True)]


def judged(sample: Sequence[float]) -> dict[str, Any]:
    """Mean difference in points, standard error, t (None: all differences are equal), two-sided p of a paired t-test,
    and what that says."""
    mean, error = spread(sample)
    t = mean / error if error else None
    p = 2 * float(stats.t.sf(abs(t), len(sample) - 1)) if t is not None else float(mean == 0)
    says = "within the noise" if p >= LEVEL else "holds" if mean > 0 else "does not hold here"
    return {"points": mean, "error": error, "t": t, "p": p, "pairs": len(sample), "verdict": says}


def verdict(found: dict[str, Any]) -> dict[str, Any]:
    """The claim, for each mode and alpha: in each cell and, under `overall`, for the mean over cells of each number of
    a pair; `text` says the latter in words. A chosen alpha is ahead in part because it is the best of five on held-out
    images, which a single space does not have to choose from.

    found    of `pairs.run`, with at least two pairs a cell"""
    rows, overall = [], []
    for mode, prefix in MODES.items():
        for way in MUDSC:
            ahead = {title(cell): differences(cell, prefix, way) for cell in found["cells"]}
            for cell in found["cells"]:
                against = opponent(cell, prefix)
                rows.append({"cell": title(cell), "way": prefix + way, "against": against} | judged(ahead[title(cell)]))
            over_cells = [fmean(sample) for sample in zip(*ahead.values(), strict=True)]
            overall.append({"mode": mode, "way": prefix + way} | judged(over_cells))
    says = (f"{row['way']}: {row['verdict']} ({row['points']:+.1f} ± {row['error']:.1f} points)" for row in overall)
    text = f"against the better single space: {'; '.join(says)}"
    return {"claim": CLAIM, "rows": rows, "overall": overall, "text": text}


def table(found: dict[str, Any]) -> str:
    """Markdown: joint accuracy of each way in each cell, mean and standard error over pairs in percent; then how far
    each MuDSC is ahead of the better single space."""
    cells = found["cells"]
    own = [spread([100 * accuracy for pair in cell["pairs"] for accuracy in pair["own"]]) for cell in cells]
    lines = [line("% of test images", *map(title, cells)), line("---", *["---"] * len(cells))]
    lines.append(line("(each model on what it knows)", *(shown(*of) for of in own)))
    for way in cells[0]["pairs"][0]["ways"]:
        lines.append(line(way, *(shown(*spread(values(cell, way))) for cell in cells)))
    for prefix in MODES.values():
        for way in MUDSC:
            of = [judged(differences(cell, prefix, way)) for cell in cells]
            cost = (f"{row['points']:+.1f} ± {row['error']:.1f}: {row['verdict']}" for row in of)
            lines.append(line(f"{prefix}{way}, less the better single space", *cost))
    return "\n".join(lines) + "\n"


def line(*entries: str) -> str:
    return f"| {' | '.join(entries)} |"


def shown(mean: float, error: float) -> str:
    return f"{mean:.1f} ± {error:.1f}"


def draw(found: dict[str, Any], out: Path) -> Path:
    """A panel a mode: of each cell and MuDSC the difference to the better single space, a point a pair, and its mean
    with the interval that a t-test at LEVEL leaves it."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    cells = found["cells"]
    figure, panels = pyplot.subplots(1, len(MODES), figsize=(10, 4), layout="constrained", sharey=True)
    for axes, (mode, prefix) in zip(panels, MODES.items(), strict=True):
        for number, way in enumerate(MUDSC):
            for place, cell in enumerate(cells):
                ahead, x = differences(cell, prefix, way), place + 0.3 * (number - 0.5)
                mean, error = spread(ahead)
                reach = error * float(stats.t.isf(LEVEL / 2, len(ahead) - 1))
                axes.plot([x] * len(ahead), ahead, f"C{number}.", alpha=0.35)
                label = way if place == 0 else None
                axes.errorbar(x + 0.08, mean, reach, fmt=f"C{number}o", capsize=3, label=label)
        axes.axhline(0, color="k", linewidth=0.8)
        axes.set_xticks(range(len(cells)), [title(cell).replace(", ", "\n") for cell in cells])
        axes.set_title(mode)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("points ahead of the better single space")
    panels[0].legend(frameon=False)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
    return out
