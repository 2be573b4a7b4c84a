"""Models that are observed while they are merged: the same result as observing first, and nothing else is kept."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from pymerge.engine.plan import Options
from pymerge.errors import InputError, NonFinite, RecipeError
from tests.models import read_model, same

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.engine.live_models import add_tokenizer, batch_for, children, write_texts  # noqa: E402

METHODS: dict[str, dict[str, Any]] = {
    "esm": {"method": "esm"},
    "pave + ties": {"purify": {"method": "pave", "rank_ratio": 0.8}, "method": "ties", "density": 0.5},
    "pave + ties over the model": {"purify": "pave", "method": "ties", "density": 0.5, "scope": "global"},
    "regmean": {"method": "regmean"},
}


def close(one: Path, other: Path) -> None:
    a, b = read_model(one), read_model(other)
    assert a.keys() == b.keys()
    for name in a:
        scale = float(b[name].abs().max()) or 1.0
        assert float((a[name] - b[name]).abs().max()) <= 1e-6 * scale, name


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "gpt2"])
def test_the_same_as_observing_first(tmp_path: Path, kind: str, name: str) -> None:
    base, tuned = children(tmp_path, kind)
    batches = [batch_for(kind, task) for task in range(2)]
    found = [pymerge.observe(path, [batch]) for path, batch in zip(tuned, batches, strict=True)]
    first = pymerge.merge(base, tuned, **METHODS[name], statistics=found, out=tmp_path / "two")
    before = set(threading.enumerate())
    summary = pymerge.merge(base, tuned, **METHODS[name], data=batches, out=tmp_path / "one")
    close(tmp_path / "one", tmp_path / "two")
    assert first["per_tensor"].keys() == summary["per_tensor"].keys()
    assert set(threading.enumerate()) <= before
