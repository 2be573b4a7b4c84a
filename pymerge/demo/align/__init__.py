"""Part two of the demo: two networks that share nothing but their architecture, merged with their units aligned."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def run(out: str | Path) -> dict[str, Any]:
    """Train two classifiers of each kind, one on the digits 0 to 4 and one on 5 to 9, from different seeds; merge them
    in each way; print accuracies over all ten digits; draw the loss between the two.

    out      folder that keeps the models, results.json and, where matplotlib is installed, landscape.png
    Returns  what results.json holds
    Raises   MergeError: scikit-learn or transformers is missing (`pip install "pymerge[demo]"`)
    Cost     about two minutes of two processors, most of it training"""
    from pymerge.demo.align.show import show

    return show(Path(out))
