"""No command writes over a file of what it reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import pymerge
from pymerge.checkpoint.place import check_output_file
from pymerge.cli import app
from pymerge.errors import OutputError
from tests.models import family

COMMANDS = [
    ("inspect base tuned0 -o tuned0/model.safetensors", "tuned0/model.safetensors"),
    ("inspect base tuned0+tuned1 -o tuned1/model.safetensors", "tuned1/model.safetensors"),
    ("inspect base tuned0 --json base/config.json", "base/config.json"),
    ("inspect base tuned0 --json linked.json", "base/config.json"),
    ("inspect base/model.safetensors tuned0 -o base/model.safetensors", "base/model.safetensors"),
    ("inspect base tuned0 --png tuned0/figures", "tuned0/model.safetensors"),
    ("inspect base tuned0 --svg base", "base/model.safetensors"),
    ("observe tuned0 --data d.jsonl -o tuned0/model.safetensors", "tuned0/model.safetensors"),
    ("observe tuned0 --data d.jsonl -o d.jsonl", "d.jsonl"),
    ("align base tuned0 -o tuned0/model.safetensors", "tuned0/model.safetensors"),
    ("report merged -o merged/model.safetensors", "merged/model.safetensors"),
    ("report merged -o merged/merge.json", "merged/merge.json"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, two models, a merge of them, samples, and a link to a file of the base."""
    base, models = family(tmp_path, 2)
    options = pymerge.Options(progress=False)
    pymerge.merge(
        str(base), [str(m) for m in models], method="task_arithmetic", out=tmp_path / "merged", options=options
    )
    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n')
    (base / "config.json").write_text("{}")
    (tmp_path / "linked.json").symlink_to(base / "config.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("line", "kept"), COMMANDS, ids=[line for line, _ in COMMANDS])
def test_refused_before_anything_is_computed(line: str, kept: str, here: Path) -> None:
    before = (here / kept).read_bytes()
    found = CliRunner().invoke(app, line.split())
    assert found.exit_code == 5 and "OutputError" in found.output, found.output
    assert (here / kept).read_bytes() == before and not (here / "tuned0/figures").exists()


def test_new_files_and_pages_may_lie_in_an_input(here: Path) -> None:
    (here / "tuned0/report.html").write_text("of last week")
    for out in ("tuned0/report.html", "tuned0/new.json", "elsewhere.safetensors"):
        check_output_file(out, ["base", "tuned0", "not/here"])


def test_a_linked_file_of_an_input_is_one(here: Path) -> None:
    """As in the Hub's cache: the folder holds links, the file lies elsewhere."""
    (here / "tuned0/model.safetensors").rename(here / "blob")
    (here / "tuned0/model.safetensors").symlink_to(here / "blob")
    with pytest.raises(OutputError, match="replaces a file of the input"):
        check_output_file(here / "blob", ["tuned0"])
