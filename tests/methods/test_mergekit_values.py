"""Methods whose formula is mergekit's, against values that mergekit 0.1.5 gave (data/make_mergekit_methods.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from pymerge import methods
from tests.methods.conftest import Merge

STORED = Path(__file__).parent / "data" / "mergekit_methods.safetensors"
with safe_open(STORED, framework="pt") as _file:
    CASES: list[dict[str, Any]] = json.loads(_file.metadata()["cases"])


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[f"{c['method']}-{c['input']}-{c['parameters']}" for c in CASES]
)
def test_value(number: int, merge: Merge) -> None:
    case = CASES[number]
    with safe_open(STORED, framework="pt") as file:
        base, *tuned = file.get_tensor(f"in.{case['input']}")
        expected = file.get_tensor(f"out.{number}")
    method: Any = methods.get(case["method"])(**case["parameters"])
    merged = merge(method, base, [base, tuned[0]] if method.base_role == "first" else tuned)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1.2e-7 * float(expected.abs().max()))


def test_every_kind_of_case_is_there() -> None:
    assert {case["method"] for case in CASES} == {"sce", "nearswap", "arcee_fusion", "ram", "ramplus_tl"}
    assert len({case["input"] for case in CASES}) == 10
