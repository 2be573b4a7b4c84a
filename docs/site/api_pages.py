"""The API reference: signatures and docstrings of the public names, as they are in the source."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pymerge
from pymerge import align, errors, linalg, methods, statistics
from pymerge.ops import OPERATORS

# Modules that users import from; of `pymerge` the names that are modules have pages of their own.
PAGES: dict[str, tuple[str, ...]] = {
    "pymerge": tuple(name for name in pymerge.__all__ if name not in ("align", "linalg", "methods", "ops")),
    "pymerge.methods": tuple(methods.__all__),
    "pymerge.statistics": tuple(statistics.__all__),
    "pymerge.align": tuple(align.__all__),
    "pymerge.linalg": tuple(linalg.__all__),
    "pymerge.ops": OPERATORS,
    "pymerge.runtime": ("emr.load", "esmpp.load", "esmpp.attach", "esmpp.routes", "esmpp.force"),
    "pymerge.testing": ("check_method",),
    "pymerge.errors": tuple(name for name, value in vars(errors).items() if inspect.isclass(value)),
}


def found(module: str, name: str) -> Any:
    """The object; an operator is the function of its module's name."""
    place, _, last = f"{module}.{name}".rpartition(".")
    if module == "pymerge.ops":
        place = f"{module}.{name}"
    return getattr(importlib.import_module(place), last)


class Words(str):
    """Shown without quotes: annotations are text where a module postpones them."""

    __repr__ = str.__str__


def signature(name: str, value: Any) -> str:
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    plain = [p.replace(annotation=worded(p.annotation)) for p in found.parameters.values()]
    return f"{name}{found.replace(parameters=plain, return_annotation=worded(found.return_annotation))}"


def worded(annotation: Any) -> Any:
    return Words(annotation) if isinstance(annotation, str) else annotation


def text_block(text: str) -> str:
    return f"```text\n{text}\n```\n"


def entry(name: str, value: Any) -> str:
    """Heading, signature, docstring; of a class also its documented methods."""
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return f"## {name}\n\n{text_block(f'{name} = {value!r}')}"
    parts = [f"## {name}\n", text_block(f"{signature(name, value)}\n\n{inspect.getdoc(value) or ''}".rstrip())]
    if inspect.isclass(value) and not issubclass(value, BaseException):
        for key, member in vars(value).items():
            member = getattr(member, "__func__", getattr(member, "fget", member))
            if not key.startswith("_") and inspect.isfunction(member) and member.__doc__:
                parts += [f"### {name}.{key}\n", text_block(f"{signature(key, member)}\n\n{inspect.getdoc(member)}")]
    return "\n".join(parts)


def page(module: str) -> str:
    doc = inspect.getdoc(importlib.import_module(module)) or ""
    entries = (entry(name, found(module, name)) for name in PAGES[module])
    return "\n".join([f"# {module}\n", text_block(doc), *entries])
