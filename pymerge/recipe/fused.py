"""Fused weights: matrices that are merged in parts, or several that are merged as one (`split`, `join`, `spectral`)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pymerge.errors import RecipeError
from pymerge.methods.matrices import RESTS, Matrices
from pymerge.recipe.problems import Problems


@dataclass(frozen=True, kw_only=True)
class Split:
    """Tensors whose name fits `pattern` are merged in parts along `dim`: `parts` equal ones, or of these sizes."""

    pattern: str
    parts: int | tuple[int, ...]
    dim: int = 0

    def sizes(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the parts of one tensor; RecipeError where they do not make it up."""
        have = shape[self.dim]
        if isinstance(self.parts, int):
            sizes = (have // self.parts,) * self.parts
        else:
            sizes = self.parts
        if math.prod(sizes) == 0 or sum(sizes) != have:
            raise RecipeError(
                f"split: {name} is {list(shape)}: dimension {self.dim} of {have} is not made up of {self.plain_parts()}"
                f"{' equal parts' if isinstance(self.parts, int) else ''}"
            )
        return sizes

    def plain_parts(self) -> Any:
        return self.parts if isinstance(self.parts, int) else list(self.parts)

    def plain(self) -> Any:
        return {"parts": self.plain_parts(), "dim": self.dim} if self.dim else self.plain_parts()


@dataclass(frozen=True, kw_only=True)
class Fused:
    """All of a recipe's splits and joins. A join's patterns name matrices that are put one below the other."""

    splits: tuple[Split, ...] = ()
    joins: tuple[tuple[str, ...], ...] = ()

    def plain_splits(self) -> dict[str, Any]:
        """As the recipe writes them."""
        return {split.pattern: split.plain() for split in self.splits}

    def split_of(self, name: str) -> Split | None:
        return next((split for split in self.splits if fnmatchcase(name, split.pattern)), None)

    def groups(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """The names that each join puts together: those in which the stars of all its patterns stand for the same."""
        names = list(names)
        groups: list[tuple[str, ...]] = []
        for patterns in self.joins:
            found: dict[tuple[str, ...], dict[int, str]] = {}
            for i, pattern in enumerate(patterns):
                fits = re.compile(re.escape(pattern).replace(r"\*", "(.*)"))
                for name in names:
                    if match := fits.fullmatch(name):
                        found.setdefault(match.groups(), {})[i] = name
            if not found:
                raise RecipeError(f"join: no tensor fits {patterns[0]}")
            for members in found.values():
                if len(members) < len(patterns):
                    absent = [patterns[i] for i in range(len(patterns)) if i not in members]
                    raise RecipeError(f"join: beside {next(iter(members.values()))} nothing fits {', '.join(absent)}")
                groups.append(tuple(members[i] for i in range(len(patterns))))
        listed = [name for group in groups for name in group]
        twice = sorted({name for name in listed if listed.count(name) > 1} if len(set(listed)) < len(listed) else ())
        if twice:
            raise RecipeError(f"join: {twice[0]} is in two joins")
        return groups


def parse_matrices(raw: Any, problems: Problems) -> Matrices:
    """`spectral: {include: [...], exclude: [...], rest: mean | sum | base}`"""
    if raw is None:
        return Matrices()
    if not isinstance(raw, Mapping):
        problems.add("spectral", f"must be {{include: [...], exclude: [...], rest: ...}}, got {raw!r}")
        return Matrices()
    for key in raw:
        if key not in ("include", "exclude", "rest"):
            problems.unknown("spectral", key, ("include", "exclude", "rest"))
    rest = raw.get("rest")
    if rest is not None and rest not in RESTS:
        problems.add("spectral: rest", f"must be one of {', '.join(RESTS)}, got {rest!r}")
        rest = None
    patterns = {key: parse_patterns(raw.get(key), f"spectral: {key}", problems) for key in ("include", "exclude")}
    return Matrices(rest=rest, **patterns)


def parse_fused(split: Any, join: Any, problems: Problems) -> Fused:
    """`split: {PATTERN: 3 | [sizes] | {parts: ..., dim: 1}}` and `join: [[PATTERN, PATTERN, ...], ...]`"""
    if split is not None and not isinstance(split, Mapping):
        problems.add("split", f"must be a mapping from name patterns to a number of parts or sizes, got {split!r}")
        split = None
    splits = [one for pattern, parts in (split or {}).items() if (one := _split(pattern, parts, problems)) is not None]
    joins: list[tuple[str, ...]] = []
    if join is not None and not (isinstance(join, list | tuple) and all(isinstance(j, list | tuple) for j in join)):
        problems.add("join", f"must be a list of lists of name patterns, got {join!r}")
        join = None
    for i, one in enumerate(join or ()):
        patterns = parse_patterns(one, f"join[{i}]", problems)
        stars = {pattern.count("*") for pattern in patterns}
        if len(patterns) < 2 or len(stars) > 1 or any(c in pattern for pattern in patterns for c in "?["):
            problems.add(f"join[{i}]", "must be two or more name patterns with equally many stars, and no ? or [")
        else:
            joins.append(patterns)
    return Fused(splits=tuple(splits), joins=tuple(joins))


def _split(pattern: Any, raw: Any, problems: Problems) -> Split | None:
    where = f"split: {pattern}"
    parts, dim = (raw.get("parts"), raw.get("dim", 0)) if isinstance(raw, Mapping) else (raw, 0)
    if isinstance(raw, Mapping):
        for key in raw:
            if key not in ("parts", "dim"):
                problems.unknown(where, key, ("parts", "dim"))
    sizes: list[Any] = [*parts] if isinstance(parts, list | tuple) else [parts]
    fits = sizes and all(_whole(size) for size in sizes) and (len(sizes) > 1 or sizes[0] > 1)
    if not isinstance(pattern, str) or not fits or dim not in (0, 1):
        problems.add(
            where, f"must be a number of parts (2 or more), a list of sizes, or {{parts, dim: 0|1}}; got {raw!r}"
        )
        return None
    return Split(pattern=pattern, parts=tuple(sizes) if len(sizes) > 1 else sizes[0], dim=dim)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def parse_patterns(value: Any, where: str, problems: Problems) -> tuple[str, ...]:
    """One name pattern or a list of them."""
    values = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
        problems.add(where, f"must be a list of name patterns such as '*.bias', got {value!r}")
        return ()
    return tuple(values)
