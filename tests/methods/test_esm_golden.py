"""ESM through `pymerge.merge` against the released results, from activations and from their second moments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

import pymerge
from pymerge.methods.esm import kind_of
from pymerge.statistics import Moments, Statistics
from pymerge.statistics.store import Header
from tests.golden.cases import FOLDER, delta_error, read_golden
from tests.methods.esm_problems import of_covariance, of_rows

BOUND = 1e-4
# Two-dimensional tensors that the released code decomposes and pymerge does so only when asked.
TABLES = ["*positional_embedding", "token_embedding.weight", "*word_embeddings.weight", "*token_type_embeddings.weight"]
FILES = sorted(path for path in (FOLDER / "esm").glob("*.safetensors") if "esmpp" not in path.stem)


def statistics_of(acts: Mapping[str, Tensor], how: Any) -> Statistics:
    held: dict[str, Moments] = {module: how(x) for module, x in acts.items()}
    header = Header(model={"class": "golden"}, data={"batches": 1}, modules={module: module for module in held})
    return Statistics(header=header, held=held, rows={module: m.rows for module, m in held.items()})


def settings_of(params: Mapping[str, Any]) -> dict[str, Any]:
    released = params["task_norm"] == "released_identity_padding"
    return {
        "preset": params["variant"],
        "scale": params["alpha"],
        "scale_scope": {"esd_keys": "esd", "all": "all"}[params["alpha_scope"]],
        "eig_power": params["eigenvalue_power"],
        "layer_power": params["inter_layer_power"],
        "gain": params["esd_gain"],
        "task_norm": "released" if released else "delta",
    }


@pytest.mark.parametrize("how", [of_rows, of_covariance], ids=["rows", "covariance"])
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden(path: Path, how: Any) -> None:
    golden, tensors = read_golden(path), load_file(path)
    statistics = []
    for t in range(len(golden.tasks)):
        prefix = f"acts/task{t}/"
        acts = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
        statistics.append(statistics_of(acts, how))
    settings = settings_of(golden.params)
    merged = pymerge.merge(
        golden.base,
        golden.tasks,
        method="esm",
        statistics=statistics,
        spectral={"include": TABLES, "exclude": ["text_projection"]},
        **settings,
    )
    assert merged.keys() == golden.merged.keys()
    errors = {name: delta_error(merged[name], golden, name) for name in merged}
    assert max(errors.values()) <= BOUND, errors


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_kinds_are_those_of_the_released_code(path: Path) -> None:
    golden = read_golden(path)
    kinds = golden.params["layer_kinds"]
    for name in golden.base:
        if name.endswith("weight") and golden.base[name].dim() == 2:
            assert kind_of(name) == next((kind for kind in kinds if kind in name), None), name


def test_files_are_there() -> None:
    if "PYMERGE_GOLDEN_DIR" in os.environ:
        assert len(FILES) == 6
