"""The quality suite's figures (matplotlib)."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
from matplotlib.ticker import FixedLocator  # pyright: ignore[reportMissingImports]

from benchmarks.quality.recipes import BY_NAME
from benchmarks.quality.verdicts import HOLDS, SETTINGS, normalised, relative, spread

COLOURS = {"default": "#4878a8", "searched": "#d1495b"}


def recipes(families: dict[str, Any], out: Path) -> None:
    """A panel a family; of each recipe the relative score at its own scale and with the scale searched, with standard
    errors; methods of the five papers in bold."""
    ranks = {name: overall(families, name) for name in BY_NAME}
    shown = sorted((name for name, value in ranks.items() if value is not None), key=lambda name: ranks[name] or 0.0)
    figure = Figure(figsize=(2.2 + 3.4 * len(families), 1.4 + 0.22 * len(shown)), layout="constrained")
    panels = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    for axes, (name, family) in zip(panels, families.items(), strict=True):
        for how, offset in zip(SETTINGS, (-0.12, 0.12), strict=True):
            for place, recipe in enumerate(shown):
                values = list(normalised(family, recipe, how).values())
                if values:
                    mean, error = spread(values)
                    axes.errorbar(mean, place + offset, xerr=error or 0.0, fmt="o", markersize=4, color=COLOURS[how])
        base = fmean(100 * fmean(relative(family, s, of["base"]["test"]).values()) for s, of in family["seeds"].items())
        axes.axvline(base, color="black", linestyle=":", linewidth=1)
        axes.axvline(100, color="black", linestyle="--", linewidth=1)
        axes.set_title(f"{name} ({family['metric']})", fontsize=10)
        axes.set_xlabel("% of the individual models")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(shown)), shown)
    panels[0].set_ylim(-0.6, len(shown) - 0.4)
    for label, recipe in zip(panels[0].get_yticklabels(), shown, strict=True):
        label.set_fontweight("bold" if BY_NAME[recipe].kind == "seed" else "normal")
    for how, title in SETTINGS.items():
        panels[0].plot([], [], "o", color=COLOURS[how], label=title)
    panels[0].plot([], [], "k:", label="base")
    panels[0].plot([], [], "k--", label="individual models")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(out, dpi=120)


def overall(families: dict[str, Any], recipe: str) -> float | None:
    """Mean over families with the scale searched; None where no family has it."""
    found = [list(normalised(family, recipe, "searched").values()) for family in families.values()]
    return fmean(fmean(values) for values in found if values) if any(found) else None


def claims(rows: list[dict[str, Any]], out: Path) -> None:
    """Differences with standard errors, a row a claim, a panel a setting; filled where the claim holds."""
    names = list(rows[0]["found"])
    texts = list(dict.fromkeys(row["claim"] for row in rows))[::-1]
    figure = Figure(figsize=(11, 1.4 + 0.42 * len(texts)), layout="constrained")
    panels = figure.subplots(1, len(SETTINGS), sharey=True)
    for axes, (how, title) in zip(panels, SETTINGS.items(), strict=True):
        for row in (row for row in rows if row["setting"] == how):
            for number, name in enumerate(names):
                if (found := row["found"][name]) is None:
                    continue
                y = texts.index(row["claim"]) + 0.16 * (len(names) / 2 - number)
                fill = "none" if found["verdict"] != HOLDS else f"C{number}"
                axes.errorbar(
                    found["points"], y, xerr=found["error"] or 0.0, fmt="o", markersize=5, color=f"C{number}", mfc=fill
                )
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("points ahead; filled: the claim holds")
        axes.set_xscale("symlog", linthresh=2)
        axes.xaxis.set_major_locator(FixedLocator([-20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20]))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(texts)), texts)
    for number, name in enumerate(names):
        panels[0].plot([], [], "o", color=f"C{number}", label=name)
    figure.legend(loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(out, dpi=120)
