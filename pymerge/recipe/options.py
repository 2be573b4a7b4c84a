"""The keys of a recipe that hold one plain value: dtypes, seed, which checks are relaxed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pymerge.methods.names import nearest
from pymerge.recipe.keys import DTYPE_WORDS, DTYPES, RELAXATIONS
from pymerge.recipe.problems import Problems


def parse_options(raw: Mapping[Any, Any], problems: Problems) -> dict[str, Any]:
    """dtype, out_dtype, seed, strict and relax of a recipe."""
    dtypes = {key: _dtype(raw.get(key), key, problems) for key in ("dtype", "out_dtype")}
    seed, strict = _seed(raw.get("seed"), problems), _strict(raw.get("strict"), problems)
    return dtypes | {"seed": seed, "strict": strict, "relax": _relax(raw.get("relax"), problems)}


def _dtype(value: Any, key: str, problems: Problems) -> str | None:
    if value is None:
        return None
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name not in DTYPES:
        problems.add(key, f"unknown dtype {value!r}: {nearest(DTYPE_WORDS.get(name, name), DTYPES)}")
        return None
    return name


def _seed(value: Any, problems: Problems) -> int:
    value = 0 if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        problems.add("seed", f"must be a whole number from 0 to 2^63 - 1, got {value!r}")
        return 0
    return value


def _strict(value: Any, problems: Problems) -> bool:
    if value is not None and not isinstance(value, bool):
        problems.add("strict", f"must be true or false, got {value!r}")
    return value is not False


def _relax(value: Any, problems: Problems) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        names = ", ".join(f"{name}: {'|'.join(choices)}" for name, choices in RELAXATIONS.items())
        problems.add("relax", f"must be a mapping of {names}; got {value!r}")
        return {}
    for name, choice in value.items():
        if name not in RELAXATIONS:
            problems.unknown("relax", name, RELAXATIONS, "check")
        elif choice not in RELAXATIONS[name]:
            problems.add(f"relax: {name}", f"must be {' or '.join(RELAXATIONS[name])}, got {choice!r}")
    return {str(name): str(choice) for name, choice in value.items()}
