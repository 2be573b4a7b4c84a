"""A family whose merges are scored by how far their scale is from the best one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.models import family, read_model

BEST = 0.83
NAME = "layers.0.up.weight"


@dataclass
class Problem:
    """A recipe file of task arithmetic, and an evaluation that knows every call."""

    folder: Path
    base: Path
    models: list[Path]
    best: float = BEST
    calls: list[float] = field(default_factory=list)
    seen: list[set[str]] = field(default_factory=list)  # in the work folder during each call
    fails_at: int | None = None
    failure: BaseException = field(default_factory=KeyboardInterrupt)

    @property
    def work(self) -> Path:
        return self.folder / "recipe.search"

    def recipe(self, **changes: Any) -> Path:
        entry = {
            "base_model": str(self.base),
            "models": [{"model": str(m)} for m in self.models],
            "merge_method": "task_arithmetic",
            "parameters": {"weight": 1.0},
        } | changes
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(entry, sort_keys=False))
        return path

    def scale_of(self, folder: str) -> float:
        """The scale of a merge by task arithmetic, from its weights."""
        base, merged = read_model(self.base)[NAME], read_model(Path(folder))[NAME]
        total = sum(read_model(m)[NAME] - base for m in self.models)
        return float(((merged - base) * total).sum() / (total * total).sum())

    def parabola(self, folder: str) -> float:
        """Largest, 0, at the best scale."""
        self.seen.append({path.name for path in Path(folder).parent.iterdir()})
        if len(self.calls) == self.fails_at:
            raise self.failure
        self.calls.append(self.scale_of(folder))
        return -((self.calls[-1] - self.best) ** 2)

    def of_tasks(self, folder: str) -> dict[str, float]:
        score = self.parabola(folder)
        return {"a": score + 0.5, "b": score - 0.1}


def problem_in(folder: Path, count: int = 2) -> Problem:
    base, models = family(folder, count)
    return Problem(folder, base, models)


def constant(value: Any) -> Callable[[str], Any]:
    return lambda folder: value
