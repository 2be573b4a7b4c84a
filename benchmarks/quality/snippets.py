"""Text classification tasks made of files that Python packages bring: pymerge's own dependencies and Python itself.

Every text is exactly LENGTH tokens long, so that no batch has padding; every file belongs to one split alone."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import itertools
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import pymerge

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LENGTH = 28  # tokens of a text with [CLS] and [SEP]
SPLITS = ("train", "validation", "test")
SHARES = {"train": 5, "validation": 1, "test": 2}  # of the files, in eighths
PER_FILE = 12  # texts of one class at most

Pieces = Iterator[tuple[str, str]]  # class and text
DOCSTRING = re.compile(r'r?"""(.*?)"""', re.DOTALL)
TITLE = re.compile(r"^([A-Z][A-Za-z ]+)\n-{3,}\n", re.MULTILINE)
NO_CODE = re.compile(r"\s*(//|#|import |cimport |from |using |$)")
PARAMETER = re.compile(r"^\w+ ?: ?(.+)\n((?:[ ]{2,}.*\n?|\n)+)", re.MULTILINE)
TYPES = {
    "array": re.compile(r"(nd)?array|\{array"),
    "bool": re.compile("bool"),
    "number": re.compile(r"(int|float)(?!.*array)"),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """sources: class or "" (the pieces name it), package and suffixes of the files that are read."""

    name: str
    classes: tuple[str, ...]
    sources: tuple[tuple[str, str, str], ...]
    pieces: Callable[[str, str], Pieces]


def folder(package: str) -> Path:
    """Where a package's files are; "include": Python's C headers."""
    if package == "include":
        return Path(sysconfig.get_paths()["include"])
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise pymerge.MergeError(
            f"the package {package}, whose files the encoder's tasks are made of, is not installed"
        )
    return Path(spec.submodule_search_locations[0])


@cache
def files(package: str, suffix: str) -> dict[str, list[Path]]:
    """The files of a package by split, in the order of their paths' hashes: the same on every machine."""
    root, out = folder(package), {split: [] for split in SPLITS}
    paths = (p.relative_to(root).as_posix() for p in root.rglob(f"*{suffix}"))
    ranked = sorted((hashlib.sha256(p.encode()).hexdigest(), p) for p in paths)
    lots = [split for split in SPLITS for _ in range(SHARES[split])]
    for n, (_, path) in enumerate(ranked):
        out[lots[n % len(lots)]].append(root / path)
    return out


def code(label: str, text: str) -> Pieces:
    """Code without docstrings, comments, imports and blank lines, in pieces of some lines."""
    text = re.sub(r"/\*.*?\*/", "", DOCSTRING.sub("", text), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not NO_CODE.match(line)]
    for start in range(0, len(lines), 8):
        yield label, "\n".join(lines[start : start + 8])


def sections(text: str) -> Pieces:
    """Title and text of the sections of numpydoc docstrings."""
    for found in DOCSTRING.finditer(text):
        parts = TITLE.split(inspect.cleandoc(found[1]))
        yield from zip(parts[1::2], parts[2::2], strict=True)


def named_sections(label: str, text: str) -> Pieces:
    return ((title.capitalize(), body) for title, body in sections(text))


def parameters(label: str, text: str) -> Pieces:
    """What a parameter or a result means, labelled by its type."""
    for _, body in sections(text):
        for found in PARAMETER.finditer(body):
            kinds = [name for name, pattern in TYPES.items() if pattern.match(found[1])]
            yield "".join(kinds), found[2]


def prose(label: str, text: str) -> Pieces:
    """Sentences of docstrings, every other one with neighbouring words swapped."""
    for n, found in enumerate(DOCSTRING.finditer(text)):
        words = found[1].split()
        if n % 2:
            words = [w for pair in itertools.zip_longest(words[1::2], words[::2]) for w in pair if w]
        yield "as written" if n % 2 == 0 else "swapped", " ".join(words)


NUMPYDOC = tuple(("", package, ".py") for package in ("scipy", "sklearn", "networkx", "numpy"))
LANGUAGES = (
    ("C", "include", ".h"),
    ("C", "numpy", ".h"),
    ("C++", "torch", ".h"),
    ("Cython", "scipy", ".pyx"),
    ("Cython", "sklearn", ".pyx"),
    ("CMake", "torch", ".cmake"),
    ("Python", "torch", ".py"),
)
TASKS = (
    Task(name="language", classes=("C", "C++", "Cython", "CMake", "Python"), sources=LANGUAGES, pieces=code),
    Task(
        name="section",
        classes=("Examples", "Notes", "Parameters", "References", "See also"),
        sources=NUMPYDOC,
        pieces=named_sections,
    ),
    Task(name="type", classes=tuple(TYPES), sources=NUMPYDOC, pieces=parameters),
    Task(name="order", classes=("as written", "swapped"), sources=NUMPYDOC, pieces=prose),
)


def texts(
    task: Task, split: str, count: int, tokenizer: Tokenizer, seen: set[tuple[int, ...]]
) -> tuple[Tensor, Tensor]:
    """Tokens [N, LENGTH] and their classes [N], equally many of each, at most `count`, from the files of a split, which
    are read in turn from each source. Texts in `seen` are passed over, the new ones are put there."""
    per_class = count // len(task.classes)
    found: dict[str, list[tuple[int, ...]]] = {name: [] for name in task.classes}
    sources = [[(label, file) for file in files(package, suffix)[split]] for label, package, suffix in task.sources]
    for label, file in (entry for row in itertools.zip_longest(*sources) for entry in row if entry):
        if len(found.get(label, ())) >= per_class:
            continue
        taken = dict.fromkeys(task.classes, 0)
        for name, text in task.pieces(label, file.read_text(errors="replace")):
            if taken.get(name, PER_FILE) >= PER_FILE or len(found[name]) >= per_class:
                continue
            tokens = tuple(tokenizer.encode(text[: 20 * LENGTH], add_special_tokens=False).ids[: LENGTH - 2])
            if len(tokens) == LENGTH - 2 and tokens not in seen:
                seen.add(tokens)
                found[name].append(tokens)
                taken[name] += 1
        if all(len(rows) >= per_class for rows in found.values()):
            break
    else:
        raise pymerge.MergeError(
            f"task {task.name}, {split}: {per_class} texts of each class wanted, the files of "
            f"{', '.join(sorted({package for _, package, _ in task.sources}))} have only "
            f"{ {name: len(rows) for name, rows in found.items()} }"
        )
    first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    rows = [[first, *row, last] for name in task.classes for row in found[name]]
    return torch.tensor(rows), torch.arange(len(task.classes)).repeat_interleave(per_class)
