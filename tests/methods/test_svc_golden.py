"""The authors' calibrations of golden/svc, from the merged updates that the files hold and from the tasks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pymerge import methods
from pymerge.methods._svc_directions import Divisors, calibration
from pymerge.methods.base import Combine, Notes, TaskGroup, TensorInfo
from pymerge.methods.svc import SVC
from tests.golden.cases import FOLDER

FILES = sorted((FOLDER / "svc").glob("*.safetensors"))
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "task_arithmetic": ("task_arithmetic", {"scale": 0.3}),
    "simple_average": ("task_arithmetic", {"scale": 1.0, "normalize": True}),
    "plain_sum": ("task_arithmetic", {"scale": 1.0}),
    "ties_layerwise": ("ties", {"density": 0.2, "scope": "tensor", "merge_func": "mean", "scale": 1.0}),
    "tsv_m": ("tsv_m", {"preset": "released"}),
}


@dataclass(frozen=True)
class Case:
    """One matrix of one file."""

    file: Path
    name: str

    def get(self, key: str) -> Tensor:
        with safe_open(self.file, "pt") as f:
            return f.get_tensor(f"{key}/{self.name}")

    @property
    def metadata(self) -> dict[str, Any]:
        with safe_open(self.file, "pt") as f:
            found = f.metadata()
        return {key: json.loads(found[key]) for key in ("params", "fp32_fp64_rel_diff", "svc_step_fp32_fp64_rel_diff")}

    @property
    def method(self) -> SVC:
        given = self.metadata["params"]
        side = "right" if given["row_space"] else "left"
        return SVC(alpha=given["alpha"], side=side, target=given["target"])

    def group(self) -> TaskGroup:
        tasks = self.metadata["params"]["T"]
        base, tuned = self.get("base"), tuple(self.get(f"task{t}") for t in range(tasks))
        notes = Notes()
        if "isoc" in self.file.stem:
            notes.basis = lambda: (self.get("intermediate/U"), self.get("intermediate/Vh").mT)
        return TaskGroup(
            info=TensorInfo(name=self.name, shape=tuple(base.shape), tasks=tasks), base=base, tuned=tuned, notes=notes
        )

    def error(self, update: Tensor) -> float:
        expected = self.get("merged").double() - self.get("base").double()
        return float((update.double() - expected).norm() / expected.norm())


def cases() -> list[Case]:
    found = []
    for path in FILES:
        with safe_open(path, "pt") as f:
            found += [Case(path, name) for name in json.loads(f.metadata()["calibrated"])]
    return found


CASES = cases()
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.file.stem}/{c.name.split('.', 5)[-1]}")


@every_case
def test_calibration_of_the_stored_update(case: Case) -> None:
    bound = max(1e-5, 10 * case.metadata["svc_step_fp32_fp64_rel_diff"][case.name])
    assert case.error(case.method.calibrate(case.get("intermediate/premerged_delta"), case.group())) <= bound


@every_case
def test_released_preset(case: Case) -> None:
    if "isoc" in case.file.stem:
        pytest.skip("its own decomposition of an isotropic update is not reproducible")
    given = case.metadata["params"]
    method = SVC(
        preset="released",
        alpha=given["alpha"],
        side="right" if given["row_space"] else "left",
        target=given["target"],
    )
    bound = max(1e-5, 10 * case.metadata["svc_step_fp32_fp64_rel_diff"][case.name])
    assert case.error(method.calibrate(case.get("intermediate/premerged_delta"), case.group())) <= bound


@every_case
def test_from_the_tasks(case: Case) -> None:
    name, arguments = BASES.get(case.metadata["params"]["base_method"].split("(")[0].strip(), ("iso_c", {}))
    if name == "iso_c":
        pytest.skip("the released directions of an isotropic update are not reproducible")
    if name not in methods.REGISTRY:
        pytest.skip(f"needs {name}")
    combine = methods.get(name)(**arguments)
    assert isinstance(combine, Combine)
    group = case.group()
    bound = max(1e-5, 10 * case.metadata["fp32_fp64_rel_diff"][case.name])
    assert case.error(case.method.calibrate(combine.combine(group), group)) <= bound


@every_case
def test_divisors(case: Case) -> None:
    method, group, update = case.method, case.group(), case.get("intermediate/premerged_delta")
    right, one = method.side == "right", method.target >= 0
    tuned = group.tuned[method.target : method.target + 1] if one else group.tuned
    divisors = Divisors(
        base=group.base.mT if right else group.base,
        tuned=[t.mT if right else t for t in tuned],
        alpha=method.alpha,
        floor="relative",
        rule="clip_then_mean",
        target=one,
    )
    given = group.notes.basis()[right] if group.notes.basis else None
    eta = calibration(update.mT if right else update, given, None, divisors).eta
    s = case.get("intermediate/S").double()
    gap = torch.full_like(s, torch.inf)
    if given is None:
        gap[:-1] = s[:-1] - s[1:]
        gap[1:] = torch.minimum(gap[1:], s[:-1] - s[1:])
    clear = gap > 1e-3 * s
    assert int(clear.sum()) > 0.8 * len(s)
    torch.testing.assert_close(eta[clear], case.get("intermediate/eta").double()[clear], rtol=1e-3, atol=0)
