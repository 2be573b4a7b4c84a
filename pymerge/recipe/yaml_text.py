"""Reads the YAML of a recipe: bounded, without code, without silently dropped keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from pymerge.errors import RecipeError

MAX_CHARACTERS: Final = 256 * 1024
MAX_NODES: Final = 100_000  # counted with every alias written out
MAX_DEPTH: Final = 32


def read_yaml(path: Path) -> Any:
    """The plain data of a YAML file."""
    return parse_yaml(_text_of(path), str(path))


def read_documents(path: Path) -> list[Any]:
    """The plain data of each document of a YAML file that is not empty."""
    return [data for data in _documents(_text_of(path), str(path)) if data is not None]


def _text_of(path: Path) -> str:
    try:
        if path.stat().st_size > 4 * MAX_CHARACTERS:
            raise RecipeError(f"{path}: {path.stat().st_size} bytes is too much for a recipe")
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise RecipeError(f"{path}: cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise RecipeError(f"{path}: not UTF-8 text (byte {e.start})") from e


def parse_yaml(text: str, source: str) -> Any:
    """The plain data of one YAML document: dicts with text keys, lists, numbers, text, booleans, None."""
    found = _documents(text, source)
    if len(found) > 1:
        raise RecipeError(f"{source}: holds {len(found)} YAML documents, a recipe is one (pymerge-multi runs several)")
    if not found:
        raise RecipeError(f"{source}: the recipe is empty")
    return found[0]


def _documents(text: str, source: str) -> list[Any]:
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(f"{source}: {len(text)} characters; a recipe has at most {MAX_CHARACTERS}")
    loader, found = None, []
    try:
        loader = yaml.SafeLoader(text)  # looks for characters that YAML forbids
        while loader.check_node():
            node: Any = loader.get_node()
            _Checker(source).size(node, 0)
            found.append(loader.construct_document(node))
    except yaml.YAMLError as e:
        raise RecipeError(f"{source}: not valid YAML: {' '.join(str(e).split())}") from e
    except (RecursionError, ValueError) as e:
        raise RecipeError(f"{source}: not a recipe: {type(e).__name__}: {e}") from e
    finally:
        if loader is not None:
            loader.dispose()
    return found


class _Checker:
    """Measures a YAML tree as if every alias were written out, before anything is built from it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sizes: dict[int, int] = {}
        self.open: set[int] = set()

    def size(self, node: yaml.Node, depth: int) -> int:
        if id(node) in self.sizes:
            return self.sizes[id(node)]
        line = node.start_mark.line + 1
        if id(node) in self.open:
            raise RecipeError(f"{self.source}: line {line}: an alias contains itself")
        if depth > MAX_DEPTH:
            raise RecipeError(f"{self.source}: line {line}: nested more than {MAX_DEPTH} levels deep")
        self.open.add(id(node))
        total = 1
        for child in self._children(node):
            total += self.size(child, depth + 1)
            if total > MAX_NODES:
                raise RecipeError(f"{self.source}: line {line}: expands to more than {MAX_NODES} values")
        self.open.discard(id(node))
        self.sizes[id(node)] = total
        return total

    def _children(self, node: yaml.Node) -> list[yaml.Node]:
        if isinstance(node, yaml.SequenceNode):
            return node.value
        if not isinstance(node, yaml.MappingNode):
            return []
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{self.source}: line {line}: a key must be plain text")
            if key.value in seen:
                raise RecipeError(f"{self.source}: line {line}: {key.value!r} is given twice")
            seen.add(key.value)
        return [value for _, value in node.value]
