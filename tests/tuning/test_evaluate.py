from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pymerge.errors import EvaluationError, RecipeError
from pymerge.tuning.evaluate import Evaluation
from tests.tuning.searching import constant

SCORES = {
    "a number": (0.5, (0.5, {})),
    "a whole number": (2, (2.0, {})),
    "numpy": (np.float32(0.5), (0.5, {})),
    "an array of one": (np.array([0.25]), (0.25, {})),
    "a tensor": (torch.tensor(0.75), (0.75, {})),
    "by task": ({"a": 0.5, "b": torch.tensor(1.0), 3: 0}, (0.5, {"a": 0.5, "b": 1.0, "3": 0.0})),
}


@pytest.mark.parametrize(("given", "wanted"), SCORES.values(), ids=SCORES)
def test_scores(given: Any, wanted: Any, tmp_path: Path) -> None:
    assert Evaluation.of(constant(given))(tmp_path, "try 1") == wanted


WRONG = {
    "NaN": (float("nan"), "must give finite numbers; the score is nan"),
    "infinite": ({"a": 1.0, "b": float("inf")}, "the score of b is inf"),
    "text": ("0.5", "must give a number.*the score is '0.5'"),
    "nothing": (None, "the score is None"),
    "a truth value": (True, "the score is True"),
    "two numbers": (np.zeros(2), "must give a number"),
    "no tasks": ({}, "an empty mapping"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_no_score(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=rf"try 7 \(scale=1\): .*{message}"):
        Evaluation.of(constant(given))(tmp_path, "try 7 (scale=1)")


@pytest.mark.parametrize("failure", [ZeroDivisionError("oh"), SystemExit(3)], ids=repr)
def test_a_failure_keeps_its_traceback(failure: BaseException, tmp_path: Path) -> None:
    def fails(folder: str) -> float:
        raise failure

    with pytest.raises(EvaluationError) as caught:
        Evaluation.of(fails)(tmp_path, "try 2")
    text = str(caught.value)
    assert text.startswith("try 2: ") and type(failure).__name__ in text and "in fails" in text


@pytest.mark.parametrize("change", ["writes", "deletes", "appends"])
def test_a_changed_folder_is_refused(change: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "there.txt").write_text("x")

    def changes(folder: str) -> float:
        path = Path(folder, "sub", "there.txt")
        {"writes": lambda: Path(folder, "new.txt").write_text(""), "deletes": path.unlink}.get(
            change, lambda: path.write_text("xy")
        )()
        return 1.0

    name = "new.txt" if change == "writes" else "sub/there.txt"
    with pytest.raises(EvaluationError, match=rf"changed the folder of the model \({name}\)"):
        Evaluation.of(changes)(tmp_path, "try 1")


def test_a_function_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("FACTOR = 2\n")
    path = tmp_path / "score.py"
    path.write_text("from beside import FACTOR\ndef of(folder):\n    return FACTOR * len(folder)\n")
    found = Evaluation.of(f"{path}:of")
    assert found(tmp_path, "")[0] == 2 * len(str(tmp_path)) and found.name == f"{path}:of"
    path.write_text(path.read_text() + "# changed\n")
    assert Evaluation.of(f"{path}:of").digest != found.digest


def test_a_function_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "scores.py").write_text("def of(folder):\n    return 4\n")
    monkeypatch.chdir(tmp_path)
    assert Evaluation.of("my_package.scores:of")(tmp_path, "") == (4.0, {})


def test_a_program(tmp_path: Path) -> None:
    path, model = tmp_path / "score.py", tmp_path / "model"
    model.mkdir()
    path.write_text("import sys\nprint('loading', sys.argv[1])\nprint(len(sys.argv[1]))\n")
    assert Evaluation.of(path)(model, "") == (float(len(str(model))), {})
    path.write_text('print(\'{"a": 1, "b": 2}\')\n')
    assert Evaluation.of(path)(model, "") == (1.5, {"a": 1.0, "b": 2.0})


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('about 3')", "must print its score as its last line, the last line is 'about 3'"),
        ("", "the last line is ''"),
        ("print('NaN')", "must give finite numbers"),
        ("raise KeyError('x')", r"failed with exit status 1[^!]*KeyError"),
    ],
)
def test_a_program_that_gives_no_number(code: str, message: str, tmp_path: Path) -> None:
    path, model = tmp_path / "score.py", tmp_path / "model"
    model.mkdir()
    path.write_text(code)
    with pytest.raises(EvaluationError, match=f"try 1: .*{message}"):
        Evaluation.of(path)(model, "try 1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere.py", "nowhere.py: no such file"),
        ("nowhere.py:of", "nowhere.py: no such file"),
        ("json", "expected FILE.py"),
        ("no.such.module:of", "module no.such.module cannot be imported"),
        ("json:no_such", "json has no function 'no_such'"),
    ],
)
def test_no_such_evaluation(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Evaluation.of(text)


def test_a_file_that_fails_when_loaded(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("1 / 0\n")
    with pytest.raises(EvaluationError, match="ZeroDivisionError"):
        Evaluation.of(f"{path}:of")
