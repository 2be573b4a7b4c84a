"""S50: torch.ops called directly with what does not fit: an exception, never a crash."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCHEMA = (HERE.parents[1] / "csrc" / "schema.cpp").read_text()
OPERATORS = re.findall(r'"(\w+)\(', SCHEMA)
CASES = 1000
ENVIRONMENT = os.environ | {"PYTHONPATH": str(HERE.parents[1])}


@pytest.mark.parametrize("name", OPERATORS)
def test_S50_no_call_of_an_operator_crashes(name: str) -> None:
    command = [sys.executable, str(HERE / "operator_fuzz.py"), name, str(CASES), "0"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1], env=ENVIRONMENT, check=False)
    assert run.returncode == 0, f"exit code {run.returncode}; last: {run.stderr[-300:]}"
    counts = json.loads(run.stdout)
    assert sum(counts.values()) == CASES
    assert min(counts.values()) > CASES // 100  # both what fits and what does not was among them
