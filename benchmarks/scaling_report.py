"""Exponents, tables and plots of what scaling.py measured."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling_points import UNITS, Point, Series, cost, start_up

AGREES = 0.15  # difference of exponents that needs no explanation, if it is not within two standard errors
SEEN = 0.3  # a point counts where the work is at least this share of the start-up
PLOTS = {
    "size": (("size", "cpu"), ("size", "rss")),
    "shape": (("tasks", "cpu"), ("width", "cpu")),
    "rank": (("rank", "cpu"), ("units", "cpu")),
}
READING = "probably: a byte of an input costs more than one of the output: converted and added (ties: counted too)"
GROWING = "probably: products and eigensolvers do not have the same rate at all widths"
FIXED = (
    "probably: the eigenproblem, the same for all T, runs at a lower rate than the products that are counted with it"
)
LINEAR = "probably: what is linear in it (reading, ranking, writing) outweighs small decompositions: steeper to the end"
PARTNERS = "n^3 is the bound; probably: units with a clear partner need few searches, each row a pass: n^2"
WHY = {
    ("linear", "tasks"): READING,
    ("ties", "tasks"): READING,
    ("assign", "units"): PARTNERS,
    ("svc", "tasks"): FIXED,
    **dict.fromkeys([(method, "width") for method in ("iso_c", "svc", "tsv_m")], GROWING),
    **dict.fromkeys([(method, what) for method in ("knots", "core_space") for what in ("rank", "tasks")], LINEAR),
}


@dataclass(frozen=True)
class Fit:
    """y = c x^exponent; error None: of two points."""

    exponent: float
    error: float | None


def fit(x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """Least squares of the logarithms; the standard error is that of the slope. None below two points."""
    if len(x) < 2:
        return None
    a, b = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    spread = sum((v - mean_a) ** 2 for v in a)
    slope = sum((v - mean_a) * (w - mean_b) for v, w in zip(a, b, strict=True)) / spread
    if len(x) == 2:
        return Fit(slope, None)
    rest = sum((w - mean_b - slope * (v - mean_a)) ** 2 for v, w in zip(a, b, strict=True))
    return Fit(slope, math.sqrt(rest / (len(x) - 2) / spread))


def work_seconds(point: Point, points: dict[str, Any]) -> float:
    """CPU seconds beyond those of the program's start."""
    start = points.get(start_up(point).key, {"cpu": 0.0})["cpu"] if point.method != "assign" else 0.0
    return points[point.key]["cpu"] - start


def counts(point: Point, points: dict[str, Any]) -> bool:
    work = work_seconds(point, points)
    return work > 0 and work >= SEEN * (points[point.key]["cpu"] - work)


def fitted(series: Series, points: dict[str, Any]) -> dict[str, Any] | None:
    """Exponents found and predicted, of the points that are there; None: too few."""
    known = [p for p in series.points if p.key in points]
    used = [p for p in known if counts(p, points)]
    found = fit([p.at(series.variable) for p in used], [work_seconds(p, points) for p in used])
    if found is None:
        return None
    predicted = fit([p.at(series.variable) for p in used], [cost(p) for p in used])
    whole = fit([p.at(series.variable) for p in known], [points[p.key]["cpu"] for p in known])
    assert predicted is not None and whole is not None
    off = abs(found.exponent - predicted.exponent)
    return {
        "method": series.method,
        "variable": series.variable,
        "from": used[0].at(series.variable),
        "to": used[-1].at(series.variable),
        "points": len(used),
        "exponent": found.exponent,
        "error": found.error,
        "predicted": predicted.exponent,
        "with_start_up": whole.exponent,
        "agrees": off <= max(AGREES, 2 * (found.error or 0.0)),
    }


def exponents(report: dict[str, Any]) -> list[str]:
    lines = [
        "| method | variable | from | to | points | exponent | standard error | predicted | start-up included | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in report["fits"]:
        error = "" if one["error"] is None else f"{one['error']:.2f}"
        why = "as predicted" if one["agrees"] else WHY.get((one["method"], one["variable"]), "**differs**")
        why = why if one["points"] > 2 else "two points: no judgement"
        cells = [one["method"], UNITS[one["variable"]], f"{one['from']:.3g}", f"{one['to']:.4g}", str(one["points"])]
        cells += [f"{one['exponent']:.2f}", error, f"{one['predicted']:.2f}", f"{one['with_start_up']:.2f}", why]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def memory(series: Sequence[Series], report: dict[str, Any]) -> list[str]:
    """Peaks along the model's size."""
    points = report["points"]
    lines = ["| method | peak RSS, MB, at GB of one model | MB more a GB more |", "| --- | --- | --- |"]
    for one in series:
        known = [p for p in one.points if p.key in points]
        if one.variable != "size" or len(known) < 2:
            continue
        peaks = [points[p.key]["rss"] / 1e6 for p in known]
        first, last = known[0].at("size"), known[-1].at("size")
        listed = ", ".join(f"{p.at('size'):.2g}: {peak:.0f}" for p, peak in zip(known, peaks, strict=True))
        lines.append(f"| {one.method} | {listed} | {(peaks[-1] - peaks[0]) / (last - first):.0f} |")
    return lines


def threads(series: Sequence[Series], report: dict[str, Any]) -> list[str]:
    points = report["points"]
    lines = [
        "| method | wall s, 1 thread | others | wall s, 2 threads | others | faster | CPU s, 2 : 1 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in series:
        if one.variable != "threads" or any(p.key not in points for p in one.points):
            continue
        a, b = points[one.points[0].key], points[one.points[-1].key]
        cells = [one.method, f"{a['wall']:.1f}", f"{a['others']:.0%}", f"{b['wall']:.1f}", f"{b['others']:.0%}"]
        lines.append("| " + " | ".join([*cells, f"{a['wall'] / b['wall']:.2f} x", f"{b['cpu'] / a['cpu']:.2f}"]) + " |")
    return lines


def table(points: dict[str, Any]) -> list[str]:
    lines = [
        "| point | runs | CPU s | wall s | peak RSS, MB | others | load | commit, time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, p in points.items():
        cells = [key, str(p["runs"]), f"{p['cpu']:.3g}", f"{p['wall']:.3g}", f"{p['rss'] / 1e6:.0f}"]
        cells += [f"{p['others']:.0%}", f"{p['load']:.1f}", f"{p['commit']}, {p['time']}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def page(series: Sequence[Series], report: dict[str, Any], pictures: Sequence[Path]) -> str:
    busy = [p["others"] for p in report["points"].values()]
    planned = {key for one in series for p in one.points for key in (p.key, start_up(p).key) if p.method != "assign"}
    planned |= {p.key for one in series for p in one.points}
    known = planned & set(report["points"])
    merges = [p for key, p in report["points"].items() if not key.startswith(("assign", "align"))]
    peak = max((p["rss"] for p in merges), default=0)
    growing = report["growing"]
    lines = [
        "# How time and memory grow",
        "",
        f"{report['processor']}, {report['date']}. Llama-shaped bfloat16 checkpoints, merged disk to disk by the "
        f"command line with `--memory {report['memory']}`, inputs in the page cache, one thread pinned to one "
        f"processor unless said otherwise; medians where there are several runs. {len(known)} of {len(planned)} points "
        f"are measured. Other programs took up to {max(busy):.0%} of the "
        f"processors, in half of the runs {sorted(busy)[len(busy) // 2]:.0%} or more: where that is much, look at CPU "
        "seconds; they vary by a few tens of per cent with what runs beside.",
        "",
        "Exponents: CPU seconds less those of the program's start against the variable, least squares of the "
        "logarithms. Predicted: the same fit to the counted cost at the same points (`benchmarks/scaling_points.py`): "
        "bytes read and written of element-wise merges, else operations of the specifications' cost sections. Size "
        "grows by layers; width with the number of layers fixed (an exponent of 3 in the width is 1.5 in the model's "
        f"size). Points whose work is less than {SEEN:.0%} of the start-up are left out.",
        "",
        *exponents(report),
        "",
        "## Memory",
        "",
        f"The largest peak of a merge is {peak / 1e6:.0f} MB, of a budget of {report['memory']}. "
        + ("No peak grows with the model:" if not growing else f"**Larger, or growing: {', '.join(growing)}**:"),
        "",
        *memory(series, report),
        "",
        "## Threads",
        "",
        *threads(series, report),
        "",
        *(f"![{path.stem}]({path.name})\n" for path in pictures),
        "## All points",
        "",
        "Method, hidden size x layers (assign: number of units), models, rank (0: the method's own), threads.",
        "",
        *table(report["points"]),
    ]
    return "\n".join(lines) + "\n"


def unbounded(series: Sequence[Series], report: dict[str, Any]) -> list[str]:
    """Methods that exceed the budget, or grow by more than 5 % of what the model does from the second smallest on."""
    found: dict[str, None] = {}
    points, budget = report["points"], float(report["memory"].removesuffix("GB")) * 1e9
    for one in series:
        known = [p for p in one.points if p.key in points] if one.method not in ("assign", "align") else []
        if any(points[p.key]["rss"] > budget for p in known):
            found[one.method] = None
        if one.variable == "size" and len(known) > 2:
            more = points[known[-1].key]["rss"] - points[known[1].key]["rss"]
            if more > 0.05e9 * (known[-1].at("size") - known[1].at("size")) and more > 20e6:
                found[one.method] = None
    return list(found)


def curve(series: Series, quantity: str, points: dict[str, Any]) -> tuple[list[float], list[float]]:
    """What there is to draw: x, and work in CPU seconds (of points that count) or peak memory in MB."""
    known = [p for p in series.points if p.key in points and (quantity == "rss" or counts(p, points))]
    y = [points[p.key]["rss"] / 1e6 if quantity == "rss" else work_seconds(p, points) for p in known]
    return [p.at(series.variable) for p in known], y


def draw(panels: Sequence[tuple[str, str]], series: Sequence[Series], points: dict[str, Any], path: Path) -> bool:
    """Panels of a variable and a quantity (cpu, rss) side by side; False: there is nothing to draw."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    drawn = []
    for variable, quantity in panels:
        curves = [(one.method, *curve(one, quantity, points)) for one in series if one.variable == variable]
        if any(len(x) > 1 for _, x, _ in curves):
            drawn.append((variable, quantity, [drawable for drawable in curves if drawable[1]]))
    if not drawn:
        return False
    figure = Figure(figsize=(5.5 * len(drawn), 4.2), layout="constrained")
    for axes, (variable, quantity, curves) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for method, x, y in curves:
            axes.plot(x, y, "o-", label=method, markersize=4)
        labels = {f"{v:.1g}" if variable == "size" else f"{v:g}": v for _, x, _ in curves for v in x}
        axes.set_xscale("log")
        axes.set_xticks(list(labels.values()), list(labels))
        axes.set_xlabel("GB of one model" if variable == "size" else UNITS[variable])
        if quantity == "cpu":
            axes.set_yscale("log")
            axes.set_ylabel("CPU s without the start-up")
        else:
            axes.set_ylim(bottom=0)
            axes.set_ylabel("peak RSS, MB")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    return True


def write_report(report: dict[str, Any], series: Sequence[Series], path: Path) -> None:
    """path, the same with .md, and at most three plots."""
    points = report["points"]
    report["fits"] = [found for one in series if one.variable != "threads" and (found := fitted(one, points))]
    report["growing"] = unbounded(series, report)
    pictures = {path.with_name(f"{path.stem}_{name}.png"): panels for name, panels in PLOTS.items()}
    drawn = [picture for picture, panels in pictures.items() if draw(panels, series, points, picture)]
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(series, report, drawn))
