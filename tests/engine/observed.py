"""A small model with every kind of observed layer, and statistics of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pymerge.checkpoint import open_checkpoint
from pymerge.statistics import Moments, Statistics
from pymerge.statistics.store import Header
from tests.methods.moments import moments_of

SHAPES = {
    "embed.weight": (9, 6),
    "layers.0.q.weight": (6, 6),
    "layers.0.k.weight": (4, 6),
    "layers.0.norm.weight": (6,),
    "layers.0.attn.in_proj_weight": (12, 6),
    "layers.1.c_fc.weight": (6, 10),  # Conv1D
    "layers.1.other.weight": (5, 6),  # never observed
}
MODULES = {"layers.0.q": "layers.0.q", "layers.0.k": "layers.0.q", "layers.0.attn": "layers.0.attn"}
CONV = {"layers.1.c_fc": "layers.1.c_fc"}
OBSERVED = ["layers.0.q.weight", "layers.0.k.weight", "layers.0.attn.in_proj_weight", "layers.1.c_fc.weight"]


def rows_of(model: int, holder: str, width: int = 6) -> Tensor:
    g = torch.Generator().manual_seed(100 * model + len(holder))
    return torch.randn(2 if holder.endswith("attn") else 20, width, generator=g) * torch.logspace(0, -1, width)


def statistics_of(model: int, modules: Mapping[str, str] | None = None, path: Path | None = None) -> Statistics:
    """Two modules share an input; one keeps its rows; one is a Conv1D."""
    modules = MODULES | CONV if modules is None else modules
    held: dict[str, Moments] = {h: moments_of(rows_of(model, h), torch.float32) for h in modules.values()}
    described: dict[str, Any] = {"class": "Test"}
    if path is not None:
        with open_checkpoint(path) as checkpoint:
            described |= checkpoint.fingerprint()
    transposed = tuple(name for name in modules if name in CONV)
    header = Header(model=described, data={"batches": 1}, modules=modules, transposed=transposed)
    return Statistics(header=header, held=held, rows={h: m.rows for h, m in held.items()})


def saved(found: Sequence[Statistics], folder: Path) -> list[Path]:
    paths = [folder / f"m{i}.stats.safetensors" for i in range(len(found))]
    for path, one in zip(paths, found, strict=True):
        one.save(path)
    return paths
