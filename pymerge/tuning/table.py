"""sweep.json: the settings of a sweep, where each one's model is, and its score."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pymerge.checkpoint.journal import normal_form
from pymerge.checkpoint.place import staging_of
from pymerge.engine.many import Pass
from pymerge.errors import OutputError
from pymerge.tuning.record import changes_text, write_json
from pymerge.version import __version__

FORMAT = 1
FILE = "sweep.json"


@dataclass(kw_only=True)
class Row:
    """One combination of values.

    folder   below that of the sweep
    seconds  from the start of its pass until the folder was complete; None: it is not
    score    the mean over tasks, or the number that the evaluation gave; None: not evaluated
    """

    values: Mapping[str, float]
    folder: str
    seconds: float | None = None
    score: float | None = None
    tasks: Mapping[str, float] = field(default_factory=dict)
    evaluate_seconds: float | None = None


@dataclass
class Table:
    """The state of a sweep in its folder. Rows of values that this call does not ask for come last and are kept.

    chosen  best, its folder, and minimize, of the last call with an evaluation"""

    folder: Path
    identity: dict[str, Any]
    evaluation: Mapping[str, Any] | None
    rows: list[Row]
    passes: list[Pass] = field(default_factory=list)
    apart: str = ""
    chosen: dict[str, Any] = field(default_factory=dict)

    def continued(self) -> None:
        """Fills in what an earlier run has left. OutputError where that was another sweep."""
        path = self.folder / FILE
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text())
            rows = [Row(**row) for row in found["settings"]]
            identity, evaluation = found["identity"], found["evaluation"]
            self.passes = [Pass(**one) for one in found["passes"]]
        except (ValueError, KeyError, TypeError) as e:
            raise OutputError(f"{path}: is no record of a sweep ({e}): choose another folder, or delete it") from e
        if changes := changes_text(identity, normal_form(self.identity)):
            if not any(map(self._is_begun, rows)):
                self.passes = []
                return
            raise OutputError(f"{path}: is of another sweep: {changes}. Choose another folder")
        known = {row.folder: row for row in rows}
        self.rows = [known.pop(row.folder, row) for row in self.rows] + list(known.values())
        if self.evaluation is None:
            self.evaluation = evaluation
            self.chosen = {key: found[key] for key in ("best", "minimize") if key in found}
        elif evaluation != self.evaluation:  # scores of another one say nothing
            for row in self.rows:
                row.score, row.tasks, row.evaluate_seconds = None, {}, None

    def _is_begun(self, row: Row) -> bool:
        """Whether anything came of a row."""
        folder = self.folder / row.folder
        there = os.path.lexists(folder) or os.path.lexists(staging_of(folder))
        return there or row.seconds is not None or row.score is not None

    def best(self, asked: Sequence[Row], minimize: bool) -> Row | None:
        """The first of the best, to be saved as such."""
        scored = [row for row in asked if row.score is not None]
        best = (min if minimize else max)(scored, key=lambda row: row.score or 0.0) if scored else None
        self.chosen = {"best": best.folder, "minimize": minimize} if best is not None else {}
        return best

    def save(self) -> None:
        plain = {
            "format": FORMAT,
            "pymerge": __version__,
            "identity": self.identity,
            "evaluation": self.evaluation,
            "settings": [asdict(row) for row in self.rows],
            "passes": [asdict(one) for one in self.passes],
            "apart": self.apart,
        }
        write_json(self.folder / FILE, plain | self.chosen)
