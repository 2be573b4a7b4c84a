"""The demo's table as a picture (matplotlib, extra `report`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(rows: list[dict[str, Any]], out: Path) -> Path:
    """Mean accuracy of every merge, best first, and with its update rescaled; lines: base and individual models."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    individual, base, *merged = (entry for entry in rows if not entry["skipped"])
    merged.sort(key=lambda entry: entry["mean"])
    places = range(len(merged))
    figure = Figure(figsize=(8, 1.2 + 0.22 * len(merged)), layout="constrained")
    axes = figure.subplots()
    axes.barh(places, [100 * entry["mean"] for entry in merged], height=0.7, color="#4878a8", label="as merged")
    rescaled = [100 * entry["rescaled_mean"] for entry in merged]
    axes.plot(rescaled, places, "D", color="#d1495b", markersize=5, label="update rescaled")
    for entry, style in ((base, ":"), (individual, "--")):
        axes.axvline(100 * entry["mean"], color="black", linestyle=style, linewidth=1, label=entry["name"].strip("()"))
    axes.set_yticks(places, [entry["name"] for entry in merged])
    axes.set_ylim(-0.6, len(merged) - 0.4)
    axes.set_xlim(min(50.0, *rescaled, *(100 * entry["mean"] for entry in rows if not entry["skipped"])) - 2, 100)
    axes.set_xlabel("mean accuracy of four tasks on 500 test images (%)")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(out, dpi=120)
    return out
