"""All methods by name: pymerge's own, and those that installed packages declare.

    [project.entry-points."pymerge.methods"]
    my_method = "my_package.my_module:MyMethod"

Such a package is imported when its method is asked for by name, or when all methods are listed. What is wrong with it
never touches pymerge's own methods.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import Field, is_dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pymerge.errors import RecipeError

if TYPE_CHECKING:
    from pymerge.methods.base import Method

GROUP: Final = "pymerge.methods"  # of entry points
STEPS: Final = ("purify", "combine", "calibrate")
M = TypeVar("M", bound="type[Method]")


class Registry(MutableMapping[str, "type[Method]"]):
    """Name -> class. Iterating names every method and imports nothing."""

    def __init__(self) -> None:
        self._classes: dict[str, type[Method]] = {}
        self._broken: dict[str, str] = {}  # plug-ins that have been asked for: what is wrong with them

    def __getitem__(self, name: str) -> type[Method]:
        """KeyError where there is no such method, RecipeError where a package declares it and cannot give it."""
        if name not in self._classes:
            self._classes[name] = self._load(name)
        return self._classes[name]

    def __setitem__(self, name: str, cls: type[Method]) -> None:
        self._classes[name] = cls

    def __delitem__(self, name: str) -> None:
        del self._classes[name]

    def __iter__(self) -> Iterator[str]:
        yield from list(self._classes)
        yield from (name for name in self._declared if name not in self._classes)

    def __len__(self) -> int:
        return len(self._classes.keys() | self._declared.keys())

    def __contains__(self, name: object) -> bool:
        return name in self._classes or name in self._declared

    def of_step(self, step: str) -> list[str]:
        """Names of the methods of one step. A package that does not give what it declares is left out and logged."""
        names = []
        for name in self:
            known = name in self._broken
            try:
                if self[name].step == step:
                    names.append(name)
            except RecipeError as e:
                if not known:
                    logging.getLogger(__name__).warning("left out: %s", e)
        return names

    @cached_property
    def _declared(self) -> dict[str, list[EntryPoint]]:
        """The plug-ins by name; more than one entry: several packages claim it."""
        found: dict[str, list[EntryPoint]] = {}
        for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, package_of(entry))):
            if entry.name in self._classes:
                text = "left out: method %r of %s: pymerge has one of that name"
                logging.getLogger(__name__).warning(text, entry.name, package_of(entry))
            else:
                found.setdefault(entry.name, []).append(entry)
        return found

    def _load(self, name: str) -> type[Method]:
        entries = self._declared.get(name)
        if entries is None:
            raise KeyError(name)
        if name not in self._broken:
            try:
                return self._import(name, entries)
            except RecipeError as e:
                self._broken[name] = str(e)
        raise RecipeError(self._broken[name])

    def _import(self, name: str, entries: list[EntryPoint]) -> type[Method]:
        if len(entries) > 1:
            packages = " and ".join(package_of(entry) for entry in entries)
            raise RecipeError(f"method {name!r}: is declared by {packages}: uninstall all but one of them")
        (entry,) = entries
        try:
            cls = entry.load()
        except (Exception, SystemExit) as e:  # whatever code of others does when it is imported
            reason = f"{type(e).__name__}: {e}".partition("\n")[0]
        else:
            reason = why_no_method(cls, name)
            if not reason:
                cls.name, cls.package = name, package_of(entry)
                return cls
        raise RecipeError(f"method {name!r} of {package_of(entry)}: {entry.value} cannot be used: {reason}")


REGISTRY: Final = Registry()


def register(name: str) -> Callable[[M], M]:
    """Class decorator: makes a method known by `name` in this process. A package declares an entry point instead."""

    def add(cls: M) -> M:
        if name in REGISTRY._classes:
            raise ValueError(f"a method called {name!r} is registered already: {REGISTRY[name].__module__}")
        cls.name = name
        REGISTRY[name] = cls
        return cls

    return add


def package_of(entry: EntryPoint) -> str:
    """`name version` of the package that declares it."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unnamed package"


def why_no_method(cls: Any, name: str) -> str:
    """What keeps an object from being a method; "" where it is one."""
    if not isinstance(cls, type) or getattr(cls, "step", None) not in STEPS:
        return "it is no subclass of pymerge.methods.Combine, Purify or Calibrate"
    undecorated = [field for field, value in vars(cls).items() if isinstance(value, Field)]
    if undecorated or not is_dataclass(cls) or cls.__hash__ is None:  # None: not frozen
        return "it is not decorated with @dataclass(frozen=True, kw_only=True)"
    if vars(cls).get("name", name) != name:
        return f"its class is known as {vars(cls)['name']!r} already"
    return ""
