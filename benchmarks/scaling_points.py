"""What scaling.py measures, and what the specifications' cost columns say of it.

A point is one run of a program; a series is the points of one method along one variable, everything else as at the
centre. The cost of a point is counted, not timed: bytes of element-wise merges, floating-point operations of the
cheaper form of each specification's cost section else (section 8; of LoRA methods and baselines the cost sentence).
Predicted exponents are fitted to these counts at the same points as the measured ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from scaling_models import layers_of, matrices, model_bytes
from spectral_flops import spectral_flops

ELEMENT_WISE, ADAPTERS = ("linear", "ties"), ("knots", "core_space")
OBSERVED = ("esm", "pave + ties")  # need statistics
MATRICES = ("iso_c", "ace", "svc", "tsv_m", *OBSERVED)
METHODS = (*ELEMENT_WISE, *MATRICES, *ADAPTERS, "extract_lora", "assign", "align")
ROWS = 2048  # of the samples behind the statistics: second moments at all widths
UNITS = {"size": "GB", "tasks": "T", "width": "hidden size", "rank": "rank", "threads": "threads", "units": "n"}


@dataclass(frozen=True)
class Point:
    """hidden: of assign the number of units; rank 0: what the method takes by itself."""

    method: str
    hidden: int
    layers: int
    tasks: int = 2
    rank: int = 0
    threads: int = 1

    @property
    def key(self) -> str:
        return f"{self.method}, {self.hidden} x {self.layers}, T {self.tasks}, r {self.rank}, {self.threads} threads"

    def at(self, variable: str) -> float:
        if variable == "size":
            return model_bytes(self.hidden, self.layers) / 1e9
        return {"width": self.hidden, "units": self.hidden}.get(variable) or getattr(self, variable)


@dataclass(frozen=True)
class Series:
    method: str
    variable: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Extent:
    """Values of the variables: hidden sizes, GB, layers. At the centre two models are merged on one thread."""

    element_hidden: int = 1024  # also of adapters
    element_gb: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    element_centre: float = 0.3
    matrix_hidden: int = 256
    matrix_gb: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    matrix_centre: float = 0.03
    limits_gb: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # fast methods only take large ones
    tasks: tuple[int, ...] = (2, 4, 8, 16)
    widths: tuple[int, ...] = (512, 768, 1024)
    wide_layers: int = 1
    ranks: tuple[int, ...] = (16, 32, 64, 128, 256)
    extracted: tuple[int, int] = (512, 4)  # hidden size and layers of what adapters are extracted from
    units: tuple[int, ...] = (512, 1024, 2048, 4096)
    threads: tuple[int, ...] = (1, 2)


FULL = Extent(
    limits_gb={
        "iso_c": (0.03, 1.0),
        "ace": (0.03, 1.0),
        "svc": (0.03, 0.3),
        "tsv_m": (0.03, 0.3),
        "pave + ties": (0.03, 0.3),
        "esm": (0.01, 0.1),
    }
)
QUICK = Extent(
    element_hidden=256,
    element_gb=(0.01, 0.03),
    element_centre=0.01,
    matrix_hidden=128,
    matrix_gb=(0.002, 0.01),
    matrix_centre=0.002,
    tasks=(2, 4),
    widths=(64, 128),
    ranks=(4, 8),
    extracted=(128, 1),
    units=(256, 512),
)


def element_series(e: Extent) -> list[Series]:
    found = []
    for method in ELEMENT_WISE:
        centre = Point(method, e.element_hidden, layers_of(e.element_centre, e.element_hidden))
        depths = [layers_of(gb, e.element_hidden) for gb in e.element_gb]
        found.append(Series(method, "size", tuple(replace(centre, layers=depth) for depth in depths)))
        found.append(Series(method, "tasks", tuple(replace(centre, tasks=t) for t in e.tasks)))
        found.append(Series(method, "threads", tuple(replace(centre, threads=t) for t in e.threads)))
    return found


def matrix_series(e: Extent) -> list[Series]:
    found = []
    for method in MATRICES:
        centre = Point(method, e.matrix_hidden, layers_of(e.matrix_centre, e.matrix_hidden))
        least, most = e.limits_gb.get(method, (min(e.matrix_gb), max(e.matrix_gb)))
        depths = [layers_of(gb, e.matrix_hidden) for gb in e.matrix_gb if least <= gb <= most]
        found.append(Series(method, "size", tuple(replace(centre, layers=depth) for depth in depths)))
        found.append(Series(method, "tasks", tuple(replace(centre, tasks=t) for t in e.tasks)))
        found.append(Series(method, "width", tuple(replace(centre, hidden=h, layers=e.wide_layers) for h in e.widths)))
        found.append(Series(method, "threads", tuple(replace(centre, threads=t) for t in e.threads)))
    esm = Point("esm", e.matrix_hidden, layers_of(e.matrix_centre, e.matrix_hidden))
    return [*found, Series("esm", "rank", tuple(replace(esm, rank=r) for r in e.ranks if 2 * r <= e.matrix_hidden))]


def other_series(e: Extent) -> list[Series]:
    """Factors of adapters, truncated decompositions, assignments."""
    found = []
    for method in ADAPTERS:
        centre = Point(method, e.element_hidden, layers_of(e.element_centre, e.element_hidden), rank=e.ranks[1])
        found.append(Series(method, "rank", tuple(replace(centre, rank=r) for r in e.ranks)))
        found.append(Series(method, "tasks", tuple(replace(centre, tasks=t) for t in e.tasks)))
    lora = Point("extract_lora", *e.extracted, tasks=1)
    found.append(Series("extract_lora", "rank", tuple(replace(lora, rank=r) for r in e.ranks)))
    found.append(Series("align", "width", tuple(Point("align", h, e.wide_layers, tasks=1) for h in e.widths)))
    return [*found, Series("assign", "units", tuple(Point("assign", n, 0) for n in e.units))]


def all_series(e: Extent) -> list[Series]:
    return [*element_series(e), *matrix_series(e), *other_series(e)]


def start_up(point: Point) -> Point:
    """The same program on next to nothing: one layer of 64."""
    rank = 4 if point.method in (*ADAPTERS, "extract_lora") else 0
    return replace(point, hidden=64, layers=1, tasks=min(2, point.tasks), rank=rank, threads=1)


def esm(m: int, n: int, p: Point) -> float:
    """8.2: an eigenproblem of m x m or n x n and coordinates a task, polar factors of both stacks, their product."""
    k = min(p.rank or m // p.tasks, m, n)
    a_task = min(2 * m * n**2 + 2 * m**2 * n + 9 * m**3, 3 * m * n**2 + 9 * n**3 + 2 * m * n * k) + 2 * k * m * n
    kept = k * p.tasks
    return p.tasks * a_task + kept**2 * (m + n) + 18 * kept**3 + 2 * m * n * kept


def pave(m: int, n: int, p: Point) -> float:
    """8: W C, its Gram matrix and eigenvectors, for the search and again; a low-rank update a task."""
    k, long = min(m, n), max(m, n)
    return p.tasks * 2 * (2 * m * n**2 + k**2 * long + 9 * k**3)


def factored(m: int, n: int, p: Point) -> float:
    """QR of the stacked factors, and the SVD of their [Tr, Tr] core (20 q^3)."""
    q = min(p.tasks * p.rank, m, n)
    return 2 * (m + n) * q**2 + 20 * q**3


def truncated(m: int, n: int, p: Point) -> float:
    """Gram matrix, all its eigenvectors, the other side's leading ones."""
    k, long = min(m, n), max(m, n)
    return k**2 * long + 9 * k**3 + 2 * long * k * p.rank


def products(m: int, n: int, p: Point) -> float:
    """The inner products of the rows and of the columns of two models, 2 n^2 D in all: of every weight twice."""
    return 2 * m * m * n + 2 * n * n * m


MATRIX_COST: dict[str, Callable[[int, int, Point], float]] = {
    "esm": esm,
    "pave + ties": pave,
    "knots": factored,
    "core_space": factored,
    "extract_lora": truncated,
    "align": products,
}


def cost(point: Point) -> float:
    """Bytes (element-wise), multiply-adds counted twice (matrices), n^3 (assignment)."""
    if point.method == "assign":
        return float(point.hidden) ** 3
    if point.method in ELEMENT_WISE:  # T + 1 reads, the base among them where it is needed, and a write
        return model_bytes(point.hidden, point.layers) * float(point.tasks + (1 if point.method == "linear" else 2))
    shapes = [(shape[0], shape[1]) for _, shape in matrices(point.hidden)]
    count = MATRIX_COST.get(point.method)
    if count is None:
        return point.layers * (spectral_flops(point.method, shapes, point.tasks) or 0.0)
    return point.layers * sum(count(m, n, point) for m, n in shapes)


def parameters(point: Point, root: str) -> dict[str, Any]:
    """The recipe of a merge."""
    names = [f"t{task}" for task in range(1, point.tasks + 1)]
    if point.method in ADAPTERS:
        names = [f"r{point.rank}{name}" for name in names]
    models: list[dict[str, Any]] = [{"model": f"{root}/{name}"} for name in names]
    if point.method in OBSERVED:
        for model, name in zip(models, names, strict=True):
            model["statistics"] = f"{root}/{name}.stats.safetensors"
    base = {} if point.method == "linear" else {"base_model": f"{root}/base"}
    rank = {"parameters": {"rank": point.rank}} if point.method == "esm" and point.rank else {}
    asked: dict[str, dict[str, Any]] = {
        "linear": {"merge_method": "linear", "parameters": {"weight": 1.0}},
        "ties": {"merge_method": "ties", "parameters": {"weight": 0.5, "density": 0.2}},
        "svc": {
            "merge_method": "task_arithmetic",
            "parameters": {"weight": 0.5},
            "calibrate": [{"method": "svc"}],
        },
        "pave + ties": {
            "merge_method": "ties",
            "parameters": {"weight": 0.5, "density": 0.2},
            "purify": {"method": "pave"},
        },
    }
    return asked.get(point.method, {"merge_method": point.method}) | rank | base | {"models": models}


def needs(points: Sequence[Point]) -> dict[str, Any]:
    """What the models of one shape must have for these points."""
    adapters: dict[int, int] = {}
    for p in points:
        if p.method in ADAPTERS:
            adapters[p.rank] = max(p.tasks, adapters.get(p.rank, 0))
    return {
        "tasks": max((p.tasks for p in points if p.method not in ADAPTERS), default=0),
        "rows": ROWS if any(p.method in OBSERVED for p in points) else 0,
        "adapters": ",".join(f"{rank}x{tasks}" for rank, tasks in sorted(adapters.items())),
    }
