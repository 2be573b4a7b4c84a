"""The demo: a small transformer and four fine-tuned children on real data, merged by each method, compared. Offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def run(out: str | Path, *, all_methods: bool = False) -> dict[str, Any]:
    """Train (once), merge, evaluate, print a table.

    out          folder that keeps base/, tasks/, merged/ (Hugging Face checkpoints), statistics/, results.json and,
                 where matplotlib is installed, accuracy.png
    all_methods  every method whatever the time
    Returns      what results.json holds
    Raises       MergeError: scikit-learn or transformers is missing (`pip install "pymerge[demo]"`), or a merge failed
    Cost         under a minute of one processor for the training, then two seconds a method"""
    from pymerge.demo.show import show

    return show(Path(out), all_methods=all_methods)
