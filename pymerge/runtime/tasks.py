"""Which of the merged models is meant."""

from __future__ import annotations

from collections.abc import Sequence

from pymerge.errors import InputError


def number_of(task: int | str, labels: Sequence[str]) -> int:
    """Number of a task, from 0, given by its number or by its model's path in the recipe."""
    if isinstance(task, str) and task in labels:
        return labels.index(task)
    if isinstance(task, int) and 0 <= task < len(labels):
        return task
    raise InputError(f"task {task!r}: the merge had {', '.join(f'{i}: {label}' for i, label in enumerate(labels))}")
