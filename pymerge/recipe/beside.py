"""What a recipe gives beside its models, and which methods use it."""

from __future__ import annotations

from collections.abc import Sequence

from pymerge.methods.base import Method
from pymerge.recipe.models import ModelRef
from pymerge.recipe.problems import Problems

# Need of methods -> the keys of a model of which one meets it, what they are.
BESIDE = {
    "fisher": (
        ("fisher",),
        "`fisher: FILE` beside {}: the diagonal of its Fisher information, safetensors with the names and shapes of "
        "its parameters",
    ),
    "covariance": (
        ("statistics", "data"),
        "`statistics: FILE` beside {}: what its linear layers see, made by `pymerge observe`; or `data: FILE`, samples "
        "of its task, which are then observed while it is merged",
    ),
}


def check_beside(steps: Sequence[type[Method]], tasks: Sequence[ModelRef], problems: Problems) -> None:
    """Fisher information, statistics and samples go with the methods that use them."""
    for need, (keys, what) in BESIDE.items():
        users = [step.name for step in steps if need in step.needs]
        sequential = bool(users) and any(step.sequential for step in steps)
        what, kinds = "`data: FILE` beside {}: samples of its task" if sequential else what, set()
        for model in tasks:
            given = tuple(key for key in keys if getattr(model, key) is not None)
            kinds.add(given)
            if users and not given:
                problems.add("models", f"{users[0]} needs {what.format(model.path)}")
            elif given and not users:
                names = ", ".join(step.name for step in steps)
                problems.add("models", f"{given[0]} of {model.path}: {names} does not use it")
        if sequential and ("statistics",) in kinds:
            problems.add("models", f"{users[0]} observes the models while they are merged: data, no statistics")
        if len({key for given in kinds for key in given}) > 1:
            problems.add("models", f"{' and '.join(keys)} are given: give one of the two for all models")
