from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def model_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty folders base, a, b, c in the current folder: a recipe only asks whether its models exist."""
    for name in ("base", "a", "b", "c"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path
