"""Reads golden files; says from folder and metadata alone which recipe makes each, and how close it must be."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pymerge import methods

FOLDER = Path(os.environ.get("PYMERGE_GOLDEN_DIR") or Path(__file__).parent / "data")

# Bounds of golden/README.md on the relative error of the merged delta, by folder.
BOUNDS = dict.fromkeys(("linear", "task_arithmetic", "slerp", "dare", "breadcrumbs", "ties"), 2e-5)
BOUNDS |= {"ace": 1e-5, "iso_c": 5e-5, "iso_cts": 2e-4, "star": 5e-5, "tsv_m": 2e-4}

# Not built yet: (folder, metadata `method`, metadata `variant`), None matches all. Their files are skipped by name.
NOT_BUILT: dict[tuple[str, str | None, str | None], str] = {
    ("core_space", None, None): "Core Space",
    ("knots", None, None): "KnOTS",
}

# (folder, tensor): why the file's answer is not ours; here a convolution gets the mean.
EXCEPTED = {("star", "conv.weight"): "SVC's port of STAR decomposes flattened convolutions, its authors matrices only"}

# Folders that need more than base and models: svc merged updates, mudsc groups of units (tests/align), the others
# activations (tests/methods).
OWN_TESTS = ("esm", "mudsc", "pave", "regmean", "svc")


@dataclass(frozen=True, kw_only=True)
class Golden:
    """One file: a merging problem and its published answer."""

    folder: str
    method: str
    params: dict[str, Any]
    base: dict[str, Tensor]
    tasks: list[dict[str, Tensor]]
    merged: dict[str, Tensor]
    masks: list[dict[str, Tensor]] = field(default_factory=list)
    precision: dict[str, float] = field(default_factory=dict)  # float32 against float64 of the authors' code, by tensor

    def bound(self, name: str) -> float:
        """On the relative error of one tensor's merged delta."""
        if (self.folder, name) in EXCEPTED:
            return float("inf")
        base = self.base[name].double()
        update = float((self.merged[name].double() - base).norm())
        stored = 1.2e-7 * float(base.norm()) / update if update and self.precision else 0.0
        return max(BOUNDS[self.folder], 10 * self.precision.get(name, 0.0)) + stored

    @property
    def with_base(self) -> bool:
        """Whether the method is given the base; `merged` is compared less the base in any case."""
        name, _ = recipe_of(self)
        return methods.describe(name).base == "required" or bool(self.params.get("task_vectors"))

    @property
    def not_built(self) -> str | None:
        """The name of the method, where it is one that is not built yet."""
        for (folder, method, variant), name in NOT_BUILT.items():
            fits = method in (None, self.method) and variant in (None, self.params.get("variant"))
            if folder == self.folder and fits:
                return name
        return None


def golden_files() -> list[Path]:
    """All files of all method folders that have no tests of their own."""
    return sorted(path for path in FOLDER.glob("*/*.safetensors") if path.parent.name not in OWN_TESTS)


def read_golden(path: Path) -> Golden:
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (not a dict)

    def under(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    count = len({key.split("/")[0] for key in tensors if key.startswith("task")})
    params = json.loads(metadata["params"])
    return Golden(
        folder=path.parent.name,
        method=metadata["method"],
        params=params if isinstance(params, dict) else {},
        base=under("base/"),
        tasks=[under(f"task{t}/") for t in range(count)],
        merged=under("merged/"),
        precision=by_tensor(metadata.get("fp32_fp64_rel_diff", "")),
        masks=[under(f"masks/task{t}/") for t in range(count)] if "masks" in {k.split("/")[0] for k in tensors} else [],
    )


def by_tensor(text: str) -> dict[str, float]:
    """The metadata's float32 against float64 figures, where there is one for each tensor."""
    return json.loads(text) if text.startswith("{") else {}


def recipe_of(golden: Golden) -> tuple[str, dict[str, Any]]:
    """Method name and Python arguments for `pymerge.merge`."""
    given = golden.params
    words = {"weights": "weight", "lambda": "scale", "alpha": "scale", "scaling_coefficient": "scale"}
    words |= {"flatten": "nuslerp_flatten", "row_wise": "nuslerp_row_wise"}
    same = ("style", "density", "normalize", "rescale", "gamma", "t", "merge_func", "eps", "tau", "k_frac")
    same += ("eta", "common_space_fraction", "normalize_weights", "max_iter", "tol")
    arguments = {words.get(key, key): value for key, value in given.items() if key in words or key in same}
    name = given.get("variant", golden.method)
    if name in ("iso_c", "iso_cts", "tsv_m"):
        arguments["preset"] = "released"
    if golden.method == "ace":
        arguments |= {"preset": "released", "spectral": {"include": ["*positional_embedding", "token_embedding*"]}}
    if golden.method == "ties" and given["style"] == "authors":
        scope = {"global": "global", "per_tensor": "tensor"}[given["scope"]]
        arguments |= {"density": given["K"] / 100, "scope": scope}
    if name == "dare_task_arithmetic":
        name = "dare_linear"
        arguments["density"] = 1 - given["drop_rate"]
    if golden.method == "breadcrumbs" and given["style"] == "authors":
        arguments |= {"density": given["beta_keep"], "gamma": given["gamma_remove"]}
    if "quirk" in given:  # of mergekit 0.1.4, mended in 0.1.5
        arguments["style"] = "mergekit-0.1.4"
    assert name in methods.REGISTRY, f"{golden.folder}: {golden.method} has no entry in NOT_BUILT and no method"
    return name, arguments


def delta_error(mine: Tensor, golden: Golden, name: str) -> float:
    """Relative error of the merged delta, absolute where the expected delta is zero."""
    base = golden.base[name].double()
    expected = golden.merged[name].double() - base
    difference = float(torch.linalg.vector_norm(mine.double() - base - expected))
    size = float(torch.linalg.vector_norm(expected))
    return difference / size if size else difference
