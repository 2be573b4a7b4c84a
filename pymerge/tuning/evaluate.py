"""The user's evaluation: a function or a program that gets the folder of a merged model and gives its scores."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from pymerge.errors import EvaluationError, RecipeError

FORMS = "FILE.py (a program that prints the score last), FILE.py:FUNCTION or package.module:FUNCTION"
Scores = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """name: as the user wrote it; digest: of its source, None where that is not known."""

    name: str
    digest: str | None
    function: Callable[[str], Any]

    @classmethod
    def of(cls, given: str | os.PathLike[str] | Callable[[str], Any]) -> Evaluation:
        """From a function, or from one of FORMS. RecipeError where there is no such function or file."""
        if callable(given):
            name = f"{getattr(given, '__module__', '?')}.{getattr(given, '__qualname__', type(given).__name__)}"
            return cls(name=name, digest=_source_digest(given), function=given)
        text = os.fspath(given)
        place, _, function = text.rpartition(":")
        if text.endswith(".py"):
            path = _existing(text)
            return cls(name=text, digest=_digest(path.read_bytes()), function=lambda folder: _run(path, folder))
        if not place or not function.isidentifier():
            raise RecipeError(f"eval: expected {FORMS}, got {text!r}")
        module = _load_file(_existing(place)) if place.endswith(".py") else _import(place)
        found = getattr(module, function, None)
        if not callable(found):
            raise RecipeError(f"eval: {place} has no function {function!r}")
        source = module.__file__
        return cls(name=text, digest=_digest(Path(source).read_bytes()) if source else None, function=found)

    def __call__(self, folder: Path, where: str) -> tuple[float, Scores]:
        """(mean, scores by task; {} where the evaluation gives one number). where: the try, for messages.

        Raises   EvaluationError: the evaluation failed, or gave something else than finite numbers, or wrote into the
                 folder."""
        before = _listing(folder)
        try:
            given = self.function(str(folder))
        except EvaluationError as e:
            raise EvaluationError(f"{where}: {e}") from e
        except (Exception, SystemExit) as e:
            raise EvaluationError(
                f"{where}: {self.name} raised {type(e).__name__}: {e}\n{traceback.format_exc()}"
            ) from e
        changed = sorted(name for name, _ in before ^ _listing(folder))
        if changed:
            raise EvaluationError(
                f"{where}: {self.name} changed the folder of the model ({', '.join(dict.fromkeys(changed))}), which is "
                "deleted after the try: let it write elsewhere"
            )
        try:
            return _scores(given)
        except ValueError as e:
            raise EvaluationError(f"{where}: {self.name} {e}") from None


def _existing(path: str) -> Path:
    if not os.path.isfile(path):
        raise RecipeError(f"eval: {path}: no such file (paths start from {os.getcwd()})")
    return Path(path).resolve()


def _digest(source: bytes) -> str:
    return hashlib.blake2b(source, digest_size=16).hexdigest()


def _source_digest(function: Callable[[str], Any]) -> str | None:
    try:
        return _digest(inspect.getsource(function).encode())
    except (OSError, TypeError):
        return None


def _load_file(path: Path) -> ModuleType:
    """The module in a file, under a name of its own; its folder is where it finds its neighbours."""
    spec = importlib.util.spec_from_file_location(f"pymerge_evaluation_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look it up
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise EvaluationError(f"eval: {path}: {type(e).__name__}: {e}\n{traceback.format_exc()}") from e
    return module


def _import(name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        return importlib.import_module(name)
    except Exception as e:
        raise RecipeError(f"eval: module {name} cannot be imported: {type(e).__name__}: {e}") from e


def _run(path: Path, folder: str) -> Any:
    """The last line that a program prints: a number, or JSON of a mapping from task to number."""
    done = subprocess.run([sys.executable, str(path), folder], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EvaluationError(f"{path} failed with exit status {done.returncode}\n{done.stderr.strip()}")
    last = done.stdout.strip().rpartition("\n")[2]
    try:
        return json.loads(last)
    except ValueError:
        raise EvaluationError(f"{path} must print its score as its last line, the last line is {last!r}") from None


def _listing(folder: Path) -> set[tuple[str, tuple[int, int]]]:
    """Every file below the folder, with its size and time."""
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    return {(str(p.relative_to(folder)), (p.lstat().st_size, p.lstat().st_mtime_ns)) for p in files}


def _scores(given: Any) -> tuple[float, Scores]:
    if not isinstance(given, Mapping):
        return _number(given, "the score"), {}
    if not given:
        raise ValueError("gave no scores: an empty mapping")
    scores = {str(task): _number(value, f"the score of {task}") for task, value in given.items()}
    return math.fsum(scores.values()) / len(scores), scores


def _number(given: Any, what: str) -> float:
    value = given
    if not isinstance(value, Real) and hasattr(value, "item"):
        with contextlib.suppress(ValueError, RuntimeError):
            value = value.item()  # of an array or a tensor with one entry
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"must give a number, or a mapping from task to number; {what} is {given!r}")
    if not math.isfinite(value):
        raise ValueError(f"must give finite numbers; {what} is {value}")
    return float(value)
