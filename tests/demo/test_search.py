"""The README's search on the digits, as it is written there, with models that have hardly learnt anything."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pymerge

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from pymerge.demo import train  # noqa: E402
from tests.demo.test_demo import SHORT  # noqa: E402

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.read_text().partition("\n## Search\n")[2].partition("\n## ")[0]
    files = re.findall(r"```\w+\n# (\S+)\n(.*?)```", section, re.DOTALL)
    assert [name for name, _ in files] == ["digits.yaml", "evaluate.py"]
    for name, text in files:
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    with train.quiet_and_alone():
        train.train_all(Path("demo-output"), lambda line: None, SHORT)
    command = re.search(r"pymerge search (\S+) --eval (\S+) --over scaling=(\S+) --out (\S+)", section)
    assert command is not None
    recipe, evaluate, values, out = command.groups()
    found = pymerge.search(recipe, evaluate, {"scaling": values}, out=out)
    assert len(found.tries) == 12 and "(12 tries here)" in section
    accuracy = train.accuracies(Path(out), Path("demo-output/tasks"))
    assert accuracy == found.best.tasks and found.best.score == max(one.score for one in found.tries)
