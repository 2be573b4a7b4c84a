"""What is shown of long work: bars at terminals, lines of JSON where they are asked for, logs where logging says."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys

import pytest
import yaml

import pymerge
from pymerge.engine import progress
from tests.models import family

SHAPES = {"embed.weight": (40, 8)} | {f"layers.{i}.w": (12, 10 + i) for i in range(4)}


@pytest.fixture
def recipe(tmp_path):
    base, models = family(tmp_path, 2, SHAPES)
    raw = {"merge_method": "ties", "base_model": str(base), "models": [{"model": str(m)} for m in models]}
    raw["parameters"] = {"weight": 1.0, "density": 0.5}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pymerge", *map(str, arguments)]


def on_a_terminal(arguments: list[str], **environment: str) -> str:
    """What a program writes where its standard error is a terminal."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(arguments, stderr=theirs, stdout=theirs, env=os.environ | {"TERM": "xterm"} | environment)
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 1 << 16):
            written += part
    except OSError:  # the other side is closed
        pass
    child.wait()
    os.close(ours)
    return written.decode()


def test_json_is_a_line_an_event_and_ends_with_what_was_done(recipe, tmp_path):
    run = subprocess.run(command("merge", recipe, tmp_path / "out", "--json"), capture_output=True, text=True)
    *progress_lines, last = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.stderr == "" and {line["event"] for line in progress_lines} == {"progress"}
    end, count = progress_lines[-1], len(SHAPES)
    assert end["bytes_read"] == end["bytes_to_read"] > 0 and end["tensors"] == end["tensors_to_read"] == count
    assert end["seconds_left"] == 0 and end["resident_bytes"] > 1e6
    summary = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert last["event"] == "merged" and last["bytes_read"] == summary["bytes_read"] == end["bytes_read"]
    run = subprocess.run(command("verify", tmp_path / "out", "--json", "-q"), capture_output=True, text=True)
    (line,) = run.stdout.splitlines()
    assert json.loads(line) == {
        "event": "verified",
        "out": str(tmp_path / "out"),
        "tensors": count,
        "bytes": summary["bytes_written"],
    }


def test_an_adapter_is_told_in_json_too(recipe, tmp_path):
    merge = command("merge", recipe, tmp_path / "out", "--as-adapter", "--rank", 2, "--json", "--quiet")
    (line,) = subprocess.run(merge, capture_output=True, text=True).stdout.splitlines()
    told = json.loads(line)
    assert (told["event"], told["r"], told["matrices"]) == ("merged", 2, len(SHAPES) - 1)  # the embedding stays whole


def test_a_bar_for_people_and_nothing_in_pipes(recipe, tmp_path):
    piped = subprocess.run(command("merge", recipe, tmp_path / "piped"), capture_output=True, text=True)
    assert piped.stderr == "" and "\x1b" not in piped.stdout
    seen = on_a_terminal(command("merge", recipe, tmp_path / "seen"))
    assert f"{len(SHAPES)}/{len(SHAPES)} tensors" in seen and "GB memory" in seen and "layers." in seen
    assert "tensors, 0.0 GB memory" not in on_a_terminal(command("merge", recipe, tmp_path / "quiet", "--quiet"))


def test_errors_are_in_colour_on_terminals_alone(tmp_path):
    wrong = command("verify", tmp_path)
    assert "\x1b[1;31mInputError" in on_a_terminal(wrong)
    assert on_a_terminal(wrong, NO_COLOR="1").count("\x1b[1;31m") == 0
    assert subprocess.run(wrong, capture_output=True, text=True).stderr.startswith("InputError: ")


def test_what_is_done_is_logged(recipe, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="pymerge"):
        pymerge.Recipe.from_yaml(recipe).run(tmp_path / "out")
    assert "5 tensors to merge" in caplog.text and "complete after" in caplog.text


def test_names_and_unknown_totals_cannot_break_the_bar(capsys):
    with progress.make_progress(None, True) as bar:
        bar.advance(10, "[red]x[/]\x1b]0;owned\x07é")
        assert (bar.read, bar.tensors) == (10, "1")
    assert "\x1b]0;" not in capsys.readouterr().err


def test_a_bar_keeps_to_one_line_of_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    bar = progress.Bar(456_700_000_000, 1234)
    bar.advance(123_400_000_000, "model.language_model.layers.17.mlp.experts.gate_up_proj.weight")
    with bar.bar.console.capture() as drawn:
        bar.bar.console.print(bar.bar.get_renderable())
    (line,) = drawn.get().splitlines()
    assert "123.4/456.7 GB" in line and "1/1234 tensors" in line and " GB memory" in line and len(line) <= 80, line
