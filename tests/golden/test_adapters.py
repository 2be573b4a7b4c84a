"""Golden files of methods that merge LoRA adapters, as folders on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pymerge
from tests.adapters import write_adapter
from tests.golden.cases import FOLDER, Golden, delta_error, read_golden
from tests.models import read_model, write_model

FILES = sorted(path for folder in ("knots", "core_space") for path in (FOLDER / folder).glob("*.safetensors"))
BOUND = 5e-5  # golden/README.md


def arguments_of(golden: Golden) -> dict[str, Any]:
    given = golden.params
    arguments: dict[str, Any] = {"scale": given["scaling"]}
    arguments["merge"] = {"tsv": "tsv_m"}.get(given["merge_method"], given["merge_method"])
    if "topK" in given:
        arguments["density"] = given["topK"] / 100
    if golden.folder == "core_space":
        return arguments | {"isotropic": given["isotropize"]}
    if given["style"] == "authors":
        return arguments | {"merge_func": given["merging_type"], "scope": given["scope"]}
    return arguments | {"scope": "tensor", "values": False}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_golden(path: Path, tmp_path: Path) -> None:
    golden = read_golden(path)
    base = write_model(tmp_path / "base", golden.base)
    adapters = [write_adapter(tmp_path / f"task{t}", task, base) for t, task in enumerate(golden.tasks)]
    pymerge.merge(base, adapters, method=golden.folder, out=tmp_path / "out", **arguments_of(golden))
    merged = read_model(tmp_path / "out")
    for name in golden.merged:
        assert delta_error(merged[name], golden, name) < BOUND
