"""The loss on the line between two models, aligned and not, as a picture (matplotlib, extra `report`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(kinds: dict[str, Any], out: Path) -> Path:
    """One panel a kind of network: loss over all ten digits from the model of 0 to 4 to the model of 5 to 9."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    size = (4.5 * len(kinds), 3.6)
    figure, panels = pyplot.subplots(1, len(kinds), figsize=size, layout="constrained", squeeze=False)
    for axes, (title, kind) in zip(panels[0], kinds.items(), strict=True):
        rows = [row for row in kind["rows"] if "line" in row]
        for row, style in zip(rows, ("k-", "C0--", "C1--", "C3-"), strict=True):
            points = [n / (len(row["line"]) - 1) for n in range(len(row["line"]))]
            axes.plot(points, row["line"], style, label=row["name"])
        axes.set_title(title)
        axes.set_xlabel("share of the model of 5 to 9")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("cross-entropy over ten digits, test images")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
    return out
