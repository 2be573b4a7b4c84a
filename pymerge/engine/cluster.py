"""Machines to simulate a merge on, from `nodes=16,gpus=8,disk=5GB/s,net=100Gbit/s`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches

from pymerge.engine.rates import Rates, parse_rate
from pymerge.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """single, double: operations of products a second; memory, link: bytes a second of its memory and to the host."""

    name: str
    single: float
    double: float
    memory: float
    link: float
    source: str


# H100 SXM: NVIDIA's data sheet (float32 67, float64 on tensor cores 67 TFLOP/s, 3.35 TB/s, PCIe Gen5 64 GB/s a way).
# Peaks, of which a merge reaches less: times from these are lower bounds.
PUBLISHED = {
    "h100": Gpu(name="h100", single=67e12, double=67e12, memory=3.35e12, link=64e9, source="published, not measured"),
}
# No data sheet gives the rate of an eigensolver. On the CPU here it runs at 0.9 of float64 products' rate, on GPUs far
# below: the tridiagonal form is bound by memory. An assumption, and printed as one; `eigen=` says another.
EIGEN_SHARE = 1 / 30

COUNTS = ("nodes", "gpus", "cores")
BYTES = ("disk", "read", "write", "storage", "net", "link", "memory")
FLOPS = ("single", "double", "eigen")
KEYS = (*COUNTS, "gpu", *BYTES, *FLOPS)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes.

    cores    compute threads of a node
    gpu      of which each node has `gpus`; 0: processors compute
    rates    of a node; `disk` and `write` are what its own disk gives, all nodes' disks together being the file system
    storage  bytes a second of a shared file system that all nodes read and write together; None: the nodes' disks
    net      bytes a second in and out of a node; None: not looked at
    eigen    operations of eigensolvers a second of a GPU
    """

    rates: Rates
    nodes: int = 1
    cores: int
    gpus: int = 0
    gpu: Gpu | None = None
    eigen: float = 0.0
    eigen_source: str = ""
    storage: float | None = None
    net: float | None = None

    def of(self, nodes: int) -> Cluster:
        return replace(self, nodes=nodes)


def parse_cluster(text: str, rates: Rates, cores: int) -> Cluster:
    """rates, cores: of this machine, for what is not given.

    Raises   RecipeError that lists every problem: unknown keys, counts, rates without a unit, what does not fit."""
    given: dict[str, str] = {}
    problems: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in KEYS:
            near = get_close_matches(key, KEYS, 1)
            problems.append(
                f"unknown {key!r}" + (f", did you mean {near[0]}?" if near else f"; known: {', '.join(KEYS)}")
            )
        elif not equals or not value:
            problems.append(f"{key} has no value: write {key}=...")
        elif key in given:
            problems.append(f"{key} is given twice")
        else:
            given[key] = value
    counts = {key: count(key, given[key], problems) for key in COUNTS if key in given}
    numbers = {key: rate(key, given[key], problems) for key in (*BYTES, *FLOPS) if key in given}
    gpu = gpu_of(given.get("gpu"), counts.get("gpus", 0), problems)
    if gpu is None and "link" in given:
        problems.append("link is that of a GPU: give gpus= too")
    if problems:
        raise RecipeError("\n".join(f"--simulate: {problem}" for problem in problems))
    return assembled(counts, numbers, gpu, rates, cores)


def assembled(counts: dict[str, int], numbers: dict[str, float], gpu: Gpu | None, rates: Rates, cores: int) -> Cluster:
    both = numbers.get("disk")
    of_node = {
        "disk": numbers.get("read", both),
        "write": numbers.get("write", both),
        **({} if gpu else {key: numbers.get(key) for key in ("memory", *FLOPS)}),
    }
    if gpu is None and "memory" not in numbers and counts.get("cores", cores) != cores:
        scaled = rates.memory * counts["cores"] / cores
        rates = rates.given({"memory": scaled}, f"{rates.source('memory')} with {cores} cores, in proportion")
    eigen = 0.0
    if gpu is not None:
        own = {key: numbers[key] for key in ("single", "double", "memory", "link") if key in numbers}
        given = f"{', '.join(own)} given; others {gpu.source}" if own else gpu.source
        gpu = replace(gpu, **own, source=given)
        eigen = numbers.get("eigen", gpu.double * EIGEN_SHARE)
    return Cluster(
        rates=rates.given({key: value for key, value in of_node.items() if value is not None}),
        nodes=counts.get("nodes", 1),
        cores=counts.get("cores", cores),
        gpus=counts.get("gpus", 0),
        gpu=gpu,
        eigen=eigen,
        eigen_source="given" if "eigen" in numbers else "assumed: a thirtieth of float64 products",
        storage=numbers.get("storage"),
        net=numbers.get("net"),
    )


def count(key: str, text: str, problems: list[str]) -> int:
    least = 0 if key == "gpus" else 1
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) < least:
        problems.append(f"{key}: {text!r} is no whole number from {least} to 999999")
        return least
    return int(text)


def rate(key: str, text: str, problems: list[str]) -> float:
    try:
        return parse_rate(key, text, "FLOP/s" if key in FLOPS else "B/s")
    except RecipeError as error:
        problems.append(str(error))
        return 1.0


def gpu_of(text: str | None, count: int, problems: list[str]) -> Gpu | None:
    """The GPU of a name or of a rate of products; an h100 where only a number of GPUs is given."""
    if not count:
        if text is not None:
            problems.append("gpu: how many a node has is missing: give gpus= too")
        return None
    if text is None or text.lower() in PUBLISHED:
        return PUBLISHED[(text or "h100").lower()]
    try:
        flops = parse_rate("gpu", text, "FLOP/s")
    except RecipeError:
        problems.append(f"gpu: {text!r} is neither one of {', '.join(PUBLISHED)} nor a rate such as 60TFLOP/s")
        return None
    like = PUBLISHED["h100"]
    return replace(like, name=text, single=flops, double=flops, source=f"given; memory and link as {like.name}")
