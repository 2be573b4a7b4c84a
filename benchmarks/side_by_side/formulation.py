"""What a comparison with a formulation in plain PyTorch is made of: the programs, their sizes, floors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peer_tools
from peer_tools import relative
from rows import Runs
from spectral_flops import FLOPS

from pymerge.methods.base import Method, TensorInfo

Floor = Callable[[peer_tools.Peaks], dict[str, Runs]]
Distance = Callable[[Any, Any], float]


@dataclass(frozen=True, kw_only=True)
class Case:
    """candidates: "pymerge" first, then formulations; distance between two results, at most bound."""

    method: str
    setting: str
    candidates: dict[str, Callable[[], Any]]
    bound: float
    floor: Floor = lambda _: {}
    distance: Distance = relative
    compared: str = "result, relative"
    note: str = ""


@dataclass(frozen=True)
class Sizes:
    """side and wide: of ViT-B's matrices, wide x side, side x wide and side x side; rows: of inputs."""

    side: int = 768
    wide: int = 3072
    rows: int = 1600
    tasks: int = 8
    layers: int = 2

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return (self.side, self.side), (self.side, self.wide), (self.wide, self.side)


QUICK = Sizes(side=48, wide=96, rows=80, tasks=2, layers=1)


def by_work(method: Method, info: TensorInfo) -> Floor:
    """Of the one route that the method has: products in the precision that it takes them in."""

    def floor(peaks: peer_tools.Peaks) -> dict[str, Runs]:
        work = method.work(info)
        return {"its products at GEMM speed": peaks.floor(single=work.single, double=work.double)}

    return floor


def frugal(name: str, m: int, n: int, tasks: int) -> Floor:
    """What the formula needs at least, all of it in float32 (spectral_flops.py)."""
    return lambda peaks: {"its products at GEMM speed": peaks.floor(single=FLOPS[name](m, n, tasks))}
