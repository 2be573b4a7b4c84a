"""Packages with methods, as pip would leave them in a folder of installed packages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

HALF = '''
from dataclasses import dataclass

from pymerge.methods import DeltaRule, ElementWiseCombine, TensorInfo, param, per_task


@dataclass(frozen=True, kw_only=True)
class Half(ElementWiseCombine):
    """W_0 plus half of the sum of the task vectors."""

    weight: float = param(1.0, "w_t", per_model=True)
    scale: float = param(0.5, "lambda")

    def rule(self, info: TensorInfo) -> DeltaRule:
        return DeltaRule(weights=per_task(self.weight, info.tasks, "weight"), scale=self.scale)
'''


def install(folder: Path, package: str, declares: Mapping[str, str], source: str = HALF, version: str = "1.0") -> None:
    """A package of one module that declares methods: name -> MODULE:CLASS."""
    module = package.replace("-", "_")
    metadata = folder / f"{module}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (folder / f"{module}.py").write_text(source)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    lines = "".join(f"{name} = {target}\n" for name, target in declares.items())
    (metadata / "entry_points.txt").write_text(f"[pymerge.methods]\n{lines}")
