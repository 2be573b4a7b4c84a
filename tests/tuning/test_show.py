"""What a search shows: text, picture, command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pymerge
from pymerge.tuning import figure as pictures
from pymerge.tuning.over import axes_of
from pymerge.tuning.record import Try
from pymerge.tuning.show import bars
from tests.tuning.searching import Problem


def tried(number: int, score: float, tasks: dict[str, float] | None = None, **values: float) -> Try:
    return Try(
        number=number,
        values=values,
        score=score,
        tasks=tasks or {},
        how="scaled",
        merge_seconds=0.1,
        evaluate_seconds=1.0,
    )


TRIES = [
    tried(1, 0.5, {"a": 0.4, "b": 0.6}, scale=0.8),
    tried(2, 0.75, {"a": 0.7, "b": 0.8}, scale=0.3),
    tried(3, 0.25, {"a": 0.5, "b": 0.0}, scale=1.0),
]


def test_bars_are_in_the_order_of_the_values() -> None:
    lines = bars(TRIES, TRIES[1]).splitlines()
    assert [line.split()[:2] for line in lines] == [["scale", "score"], ["0.3", "0.75"], ["0.8", "0.5"], ["1", "0.25"]]
    assert [line.count("█") for line in lines[1:]] == [40, 20, 0]
    assert lines[1].endswith(" 2, best") and lines[3].endswith(" 3")


def test_equal_scores_and_many_tries() -> None:
    many = [tried(i + 1, 1.0, scale=float(i)) for i in range(60)]
    lines = bars(many, many[0]).splitlines()
    assert len(lines) == 1 + 40 + 1 and "20 more" in lines[-1] and "█" * 40 in lines[1]


def test_the_curve_is_what_was_tried() -> None:
    plots = pytest.importorskip("matplotlib.figure")
    figure = plots.Figure()
    pictures._curve(figure, TRIES, TRIES[1], "scale")
    above, below = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in above.lines}
    assert lines["mean"] == [[0.3, 0.75], [0.8, 0.5], [1.0, 0.25]]
    assert lines["a"] == [[0.3, 0.7], [0.8, 0.4], [1.0, 0.5]] and lines["b"][2] == [1.0, 0.0]
    assert lines["best: 0.3\nscore 0.75\ntry 2"] == [[0.3, 0.75]]
    assert below.lines[0].get_xydata().tolist() == [[0.8, 1.0], [0.3, 2.0], [1.0, 3.0]]


def test_the_heat_map_leaves_out_what_was_not_tried() -> None:
    plots = pytest.importorskip("matplotlib.figure")
    tries = [tried(1, 0.1, x=1.0, y=5.0), tried(2, 0.2, x=2.0, y=5.0), tried(3, 0.3, x=1.0, y=7.0)]
    figure = plots.Figure()
    pictures._heat_map(figure, tries, tries[2], ["x", "y"])
    cells = figure.axes[0].images[0].get_array()
    assert cells[0].tolist() == [0.1, 0.2] and float(cells[1][0]) == 0.3 and cells.mask[1][1]
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.1", "0.2", "0.3"]


def test_a_picture_where_it_can_be_drawn(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    found = pymerge.search(problem.recipe(), problem.parabola, {"scale": [0.5, 0.7]})
    assert found.figure is None and any("matplotlib is missing" in note for note in found.notes)
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    found = pymerge.search(problem.recipe(), problem.parabola, {"scale": [0.5, 0.7]})
    assert found.figure == problem.work / "curve.png" and found.figure.read_bytes().startswith(b"\x89PNG")
    assert found.notes == ()


def test_three_hyperparameters_have_no_picture(problem: Problem) -> None:
    recipe = pymerge.Recipe.from_yaml(problem.recipe(merge_method="ties"))
    axes = axes_of(recipe, {"scale": [1], "density": [0.5], "weight": [1]})
    assert pictures.draw(Path("never"), TRIES, TRIES[0], axes) == (None, "no curve.png: more than two hyperparameters")


EVALUATION = """
import sys
from safetensors.torch import load_file

def score(folder):
    return -float(load_file(folder + "/model.safetensors")["layers.1.norm"].square().sum())

if __name__ == "__main__":
    print(score(sys.argv[1]))
"""


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pymerge", "search", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_command_line(problem: Problem, tmp_path: Path) -> None:
    recipe = problem.recipe()
    (tmp_path / "evaluate.py").write_text(EVALUATION)
    done = run(
        tmp_path, recipe, "--eval", "evaluate.py:score", "--over", "lambda=-1..1", "-o", "best", "--tolerance", 0.1
    )
    assert done.returncode == 0, done.stderr
    assert "try 9: scale=" in done.stderr and "best so far" in done.stderr
    assert "best: scale=" in done.stdout and "1 update(s) merged at scale 1" in done.stdout
    assert "model: best" in done.stdout and (tmp_path / "best" / "model.safetensors").is_file()
    again = run(tmp_path, recipe, "--eval", "evaluate.py:score", "--over", "lambda=-1..1", "--tolerance", 0.1, "-q")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    program = run(tmp_path, recipe, "--eval", "evaluate.py", "--over", "scale=0,1", "--work", "other", "--minimize")
    assert program.returncode == 0 and " 1, best" in program.stdout and "best: scale=0," in program.stdout


def test_command_line_errors(problem: Problem, tmp_path: Path) -> None:
    recipe = problem.recipe()
    (tmp_path / "nan.py").write_text("print('nan')")
    (tmp_path / "fails.py").write_text("def of(folder):\n    return {}['x']\n")
    wrong = run(tmp_path, recipe, "--eval", "nan.py", "--over", "scalin=0..1")
    assert wrong.returncode == 2 and "did you mean scaling" in wrong.stderr and "Traceback" not in wrong.stderr
    wrong = run(tmp_path, recipe, "--eval", "nan.py", "--over", "scale=0,1")
    assert wrong.returncode == 6 and "EvaluationError: try 1 (scale=0)" in wrong.stderr
    wrong = run(tmp_path, recipe, "--eval", "fails.py:of", "--over", "scale=0,1", "--work", "w")
    assert wrong.returncode == 6 and "KeyError: 'x'" in wrong.stderr and "return {}['x']" in wrong.stderr
