"""The parity run (benchmarks/side_by_side/parity.py) where mergekit is installed: every YAML agrees or differs as
stated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mergekit")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "side_by_side" / "parity.py"


@pytest.mark.slow
def test_every_yaml_agrees_or_differs_as_stated(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--mergekit-venv", sys.prefix, "--json", str(tmp_path / "parity.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
