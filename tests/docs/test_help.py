"""The examples at the end of each command's help run as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

pytest.importorskip("transformers")

from pymerge.cli import app  # noqa: E402
from tests.docs.running import run_command  # noqa: E402
from tests.docs.world import World  # noqa: E402

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# "demo" takes minutes: tests/demo runs it on a shorter schedule.
RUN_HERE = tuple("align extract-lora info inspect merge methods observe plan report search sweep verify".split())


def examples_of(name: str) -> list[str]:
    return [line for line in (COMMANDS[name].epilog or "").splitlines() if line.startswith("pymerge ")]


def test_every_command_has_an_example() -> None:
    without = [name for name in COMMANDS if not any(e.startswith(f"pymerge {name}") for e in examples_of(name))]
    assert not without, f"@app.command(epilog=examples(...)): {without}"


@pytest.mark.parametrize("name", RUN_HERE)
def test_the_examples_of_a_command_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evaluate.py").write_text("def accuracy(folder):\n    return 1.0\n")
    world = World(tmp_path)
    lines = examples_of(name)
    if name in ("report", "verify"):
        lines = [*examples_of("merge")[:1], *lines]
    for line in lines:
        world.need(line)
        run_command(line.split())
