"""Text of six kinds that comes with Python, torch, scipy and scikit-learn, and so lies wherever this suite can run."""

from __future__ import annotations

import ast
import gzip
import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from pymerge.errors import MergeError

# Twentieths of a kind's documents. A document belongs to a part by the hash of its content: the same one on every
# machine, whatever it is called, and no two parts hold copies of one document.
PARTS = {"pretraining": 6, "training": 10, "validation": 2, "test": 2}
MOST = 400_000  # bytes of a part: the versions of the packages differ in how much there is
LEAST = 8_000

Texts = dict[str, dict[str, bytes]]  # kind -> part -> text


def package(name: str) -> Path:
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise MergeError(f"language family: no package {name}; install it with: pip install {name}")
    return Path(next(iter(found.submodule_search_locations)))


def files(root: Path, *patterns: str) -> Iterator[bytes]:
    for pattern in patterns:
        for file in sorted(root.glob(pattern)):
            yield file.read_bytes()


def pieces(text: bytes, size: int) -> Iterator[bytes]:
    """Of a text that is one long list, documents of about `size` bytes, cut at line ends."""
    start = 0
    while start < len(text):
        end = text.find(b"\n", start + size) + 1 or len(text)
        yield text[start:end]
        start = end


def python() -> Iterator[bytes]:
    library = Path(sysconfig.get_paths()["stdlib"])
    packages = ("asyncio", "collections", "concurrent/futures", "ctypes", "email", "html", "http", "importlib", "json")
    packages += ("logging", "multiprocessing", "sqlite3", "unittest", "urllib", "wsgiref", "xml/dom", "xml/etree")
    return files(library, "[a-z]*.py", *(f"{name}/*.py" for name in packages))


def headers() -> Iterator[bytes]:
    return files(package("torch") / "include", "c10/core/*.h", "c10/util/*.h", "ATen/*.h", "ATen/core/*.h")


def prose() -> Iterator[bytes]:
    """The reference of the language as `help()` shows it."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield from pieces(topics[name].encode(), 4096)


def docstrings() -> Iterator[bytes]:
    for source in files(package("scipy"), *(f"{name}/*.py" for name in ("signal", "linalg", "optimize", "ndimage"))):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield (ast.get_docstring(node) or "").encode()


def declarations() -> Iterator[bytes]:
    for text in files(package("torchgen") / "packaged", "ATen/native/native_functions.yaml"):
        yield from pieces(text, 4096)


def tables() -> Iterator[bytes]:
    data = package("sklearn") / "datasets" / "data"
    for text in files(data, "breast_cancer.csv", "wine_data.csv", "iris.csv"):
        yield from pieces(text, 1024)
    for packed in files(data, "digits.csv.gz", "diabetes_data_raw.csv.gz"):
        yield from pieces(gzip.decompress(packed), 1024)


KINDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "python": python,
    "headers": headers,
    "prose": prose,
    "docstrings": docstrings,
    "declarations": declarations,
    "tables": tables,
}


def divide(documents: Iterator[bytes]) -> dict[str, bytes]:
    """The documents by part, each part in the order of the hashes and at most MOST bytes long."""
    by_hash = {hashlib.sha256(document).digest(): document for document in documents if len(document) >= 200}
    names = [name for name, share in PARTS.items() for _ in range(share)]
    parts: dict[str, list[bytes]] = {name: [] for name in PARTS}
    for digest in sorted(by_hash):
        parts[names[digest[-1] % len(names)]].append(by_hash[digest])
    return {name: b"\n".join(found)[:MOST] for name, found in parts.items()}


@cache
def texts() -> Texts:
    """Every kind in its parts. A second of reading and parsing.

    Raises  MergeError: a package is missing, or this installation lacks its texts"""
    out = {kind: divide(documents()) for kind, documents in KINDS.items()}
    short = [
        f"{kind}: {len(text)} bytes of {part}"
        for kind, parts in out.items()
        for part, text in parts.items()
        if len(text) < LEAST
    ]
    if short:
        raise MergeError(f"language family: too little text, at least {LEAST} bytes expected: {'; '.join(short)}")
    return out
