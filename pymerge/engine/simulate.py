"""How long a plan takes on this machine, or on machines that are described: seconds by what they go to, and a curve.

Reading, computing and writing overlap, so a pass takes as long as the busiest of them. What is computed on processors
shares these with the copying of what is read and written. A matrix is merged by one worker: the largest bounds every
curve. Passes follow each other, as questions about the whole model must be answered first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import Any, NamedTuple, Self

from pymerge.checkpoint import safe_name
from pymerge.engine.cluster import Cluster
from pymerge.engine.costs import Cost, Phase, cached_share, files_of, needs_torch, phases
from pymerge.engine.plan import Options, Plan
from pymerge.engine.rates import Rates

GAIN = 0.1  # doubling the nodes must save this share of the time to help
MOST_NODES = 4096
RESOURCES = ("largest", "read", "compute", "write", "network", "start")  # of equal ones the first is named
WORDS = {
    "read": "reading",
    "compute": "computing",
    "write": "writing",
    "network": "the network",
    "largest": "the largest tensor, which one node merges",
    "start": "starting",
}


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """seconds: of each of RESOURCES, and `total`; largest: the name of the tensor that takes longest."""

    nodes: int
    seconds: dict[str, float]
    largest: str = ""

    @property
    def bottleneck(self) -> str:
        return max(RESOURCES, key=lambda name: self.seconds[name])


class Times(NamedTuple):
    """Seconds of one item: of a node's disk, of a node's workers together, and where it is alone on a node."""

    read: float
    compute: float
    write: float
    alone: float

    @property
    def weight(self) -> float:
        return max(self.read, self.compute, self.write)


@dataclass
class Load:
    """Seconds of one node."""

    read: float = 0.0
    compute: float = 0.0
    write: float = 0.0

    def add(self, one: Times) -> None:
        self.read += one.read
        self.compute += one.compute
        self.write += one.write


@dataclass(frozen=True, kw_only=True)
class Job:
    """A plan as a cluster sees it: the passes, and the threads of an item that one worker merges."""

    phases: Sequence[Phase]
    item_threads: int
    torch: bool
    cached: float = 0.0  # share of the inputs that is read from the page cache


def job_of(plan: Plan, *, look: bool = True) -> Job:
    """look: whether the page cache is asked for the inputs."""
    cached = cached_share(files_of(plan)) if look else 0.0
    return Job(phases=phases(plan), item_threads=plan.item_threads, torch=needs_torch(plan.items), cached=cached)


class Simulation:
    """A job on clusters of one kind of node."""

    def __init__(self, job: Job, cluster: Cluster) -> None:
        self.job, self.cluster = job, cluster
        self.passes = [Pass.of(phase, job, cluster) for phase in job.phases]

    def at(self, nodes: int) -> Prediction:
        """The time with so many nodes."""
        rates, cluster = self.cluster.rates, self.cluster.of(nodes)
        total = rates.torch if self.job.torch else rates.start
        seconds = dict.fromkeys(RESOURCES, 0.0) | {"start": total}
        for one in self.passes:
            found = one.seconds(cluster)
            for key, value in found.items():
                seconds[key] += value
            total += max(found.values())
        largest = max(self.passes, key=lambda one: one.longest)
        return Prediction(nodes=nodes, seconds=seconds | {"total": total}, largest=largest.name)

    def curve(self) -> list[Prediction]:
        """Over 1, 2, 4, ... and all nodes."""
        return [self.at(nodes) for nodes in sorted({*doubled(self.cluster.nodes), self.cluster.nodes})]

    def limit(self) -> dict[str, Any]:
        """From how many nodes on twice as many save less than GAIN of the time, and what then takes the time."""
        before = self.at(1)
        for nodes in doubled(MOST_NODES // 2):
            after = self.at(2 * nodes)
            if after.seconds["total"] > (1 - GAIN) * before.seconds["total"]:
                return {"nodes": nodes, "why": after.bottleneck, "tensor": safe_name(after.largest)}
            before = after
        return {"nodes": None, "why": None, "tensor": None}


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A phase as a node has it.

    items    their seconds, the largest first
    moved    bytes read and written
    longest  seconds of the item that takes longest where it is alone on a node, of the tensor `name`
    """

    items: Sequence[Times]
    moved: int
    longest: float
    name: str

    @classmethod
    def of(cls, phase: Phase, job: Job, cluster: Cluster) -> Self:
        timed = sorted(
            ((times(cost, job, cluster), item.entry.name) for cost, item in zip(phase.costs, phase.items, strict=True)),
            key=lambda found: -found[0].weight,
        )
        alone, name = max(((one.alone, name) for one, name in timed), key=lambda found: found[0], default=(0.0, ""))
        moved = sum(cost.read + cost.written for cost in phase.costs)
        return cls(items=[one for one, _ in timed], moved=moved, longest=alone, name=name)

    def seconds(self, cluster: Cluster) -> dict[str, float]:
        """Of each resource, on the node that is busiest with it."""
        nodes = dealt(self.items, cluster.nodes)
        found = {key: max(getattr(node, key) for node in nodes) for key in ("read", "compute", "write")}
        if cluster.storage is not None:
            found["read"] = max(found["read"], self.moved / cluster.storage)
        return found | {"largest": self.longest, "network": across(self.moved, cluster)}


def across(moved: int, cluster: Cluster) -> float:
    """Seconds of the network: all bytes from and to shared storage; with the nodes' own disks, those of other nodes."""
    if cluster.net is None or (cluster.storage is None and cluster.nodes == 1):
        return 0.0
    share = 1.0 if cluster.storage is not None else 1 - 1 / cluster.nodes
    return share * moved / cluster.nodes / cluster.net


def times(cost: Cost, job: Job, cluster: Cluster) -> Times:
    rates = cluster.rates
    read = cost.read * (job.cached / rates.cached + (1 - job.cached) / rates.disk)
    write = cost.written / rates.write
    if cluster.gpu is not None:
        one = gpu_seconds(cost, cluster)
        return Times(read, one / cluster.gpus, write, max(one, read, write))
    one = cost.seconds(rates)
    shared = max((one + copying(cost, rates)) / cluster.cores, (cost.read + cost.written) / rates.memory)
    alone = shared if cost.divisible else one / min(job.item_threads, cluster.cores)
    return Times(read, shared, write, max(alone, read, write))


def copying(cost: Cost, rates: Rates) -> float:
    """Seconds of one thread for what is read and written, whatever the disk takes."""
    return (cost.read + cost.written) / rates.moved


def processor_seconds(job: Job, rates: Rates) -> float:
    """What all threads of a merge on one machine without GPUs take together."""
    costs = [cost for phase in job.phases for cost in phase.costs]
    start = rates.torch if job.torch else rates.start
    return start + sum(cost.seconds(rates) + copying(cost, rates) for cost in costs)


def gpu_seconds(cost: Cost, cluster: Cluster) -> float:
    """Of one GPU: what crosses the link, or what is computed, whichever is longer."""
    gpu, work = cluster.gpu, cost.work
    assert gpu is not None
    moved = cost.read + cost.written
    computed = work.single / gpu.single + work.double / gpu.double + work.eigen / cluster.eigen
    return max(moved / gpu.link, computed + (moved + work.touched) / gpu.memory)


def dealt(items: Sequence[Times], nodes: int) -> list[Load]:
    """What each node has to do: items in order, the largest first, each to the node with the least so far."""
    loads = [Load() for _ in range(nodes)]
    queue = [(0.0, number) for number in range(nodes)]
    for one in items:
        so_far, number = queue[0]
        loads[number].add(one)
        heapreplace(queue, (so_far + one.weight, number))
    return loads


def doubled(most: int) -> Iterable[int]:
    nodes = 1
    while nodes <= most:
        yield nodes
        nodes *= 2


def local(plan: Plan, options: Options, rates: Rates) -> Prediction:
    """The time of the merge in this process."""
    return Simulation(job_of(plan), Cluster(rates=rates, cores=options.thread_count)).at(1)


def simulated(plan: Plan, cluster: Cluster) -> dict[str, Any]:
    """What `pymerge plan --simulate` says, for machines."""
    simulation = Simulation(job_of(plan, look=False), cluster)
    points = simulation.curve()
    first = points[0].seconds["total"]
    return {
        "cluster": described(cluster),
        "seconds": rounded(points[-1].seconds),
        "bottleneck": points[-1].bottleneck,
        "largest": safe_name(points[-1].largest),
        "curve": [
            {"nodes": p.nodes, "bottleneck": p.bottleneck, "efficiency": round(first / p.nodes / p.seconds["total"], 3)}
            | rounded(p.seconds)
            for p in points
        ],
        "memory": plan.at_once * max((item.peak_bytes for item in plan.items), default=0),
        "limit": simulation.limit(),
        "error": ERROR,
    }


ERROR = (
    "an estimate: compared with merges on one machine alone (benchmarks/results/cost_model.md has the errors); "
    "several nodes and GPUs are not measured"
)


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {key: float(f"{value:.4g}") for key, value in seconds.items()}


def described(cluster: Cluster) -> dict[str, Any]:
    """What was assumed, and where each figure is from."""
    rates, gpu = cluster.rates, cluster.gpu
    used = ["disk", "write", "start", "torch"]
    used += [] if gpu else ["moved", "memory", "single", "double", "eigen", "touch"]
    found: dict[str, Any] = {"nodes": cluster.nodes, "cores": cluster.cores, "gpus": cluster.gpus}
    found["rates"] = {name: {"value": getattr(rates, name), "source": rates.source(name)} for name in used}
    if gpu is not None:
        numbers = {name: getattr(gpu, name) for name in ("single", "double", "memory", "link")}
        found["gpu"] = {"name": gpu.name, "source": gpu.source, **numbers, "eigen": cluster.eigen}
        found["gpu"]["eigen_source"] = cluster.eigen_source
    return found | {"storage": cluster.storage, "net": cluster.net}
