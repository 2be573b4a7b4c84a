from __future__ import annotations

from pathlib import Path

import pytest

from tests.tuning.searching import Problem, problem_in


@pytest.fixture
def problem(tmp_path: Path) -> Problem:
    return problem_in(tmp_path)
