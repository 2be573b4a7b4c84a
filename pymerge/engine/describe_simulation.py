"""Simulated merges and measured rates, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from pymerge.engine.console import standard_output
from pymerge.engine.rates import Rates, processor
from pymerge.engine.simulate import GAIN, MOST_NODES, WORDS

COLUMNS = {"total": "time", "read": "read", "compute": "compute", "write": "write", "network": "network"}
UNITS = {"single": "FLOP/s", "double": "FLOP/s", "eigen": "FLOP/s", "start": "s", "torch": "s"}
MEANING = {
    "single": "float32 products, a thread",
    "double": "float64 products, a thread",
    "eigen": "float64 eigensolver, a thread",
    "touch": "plain tensor operations, a thread",
    "cached": "reading from the page cache, a thread",
    "disk": "reading what is not in the page cache (a host's cache may have it)",
    "write": "writing, put on disk",
    "moved": "what a merge reads and writes, arithmetic apart, a thread",
    "memory": "copies in memory, all threads",
    "link": "between host and GPU",
    "start": "of a merge, without torch",
    "torch": "of a merge, with torch",
}


def scaled(value: float, unit: str) -> str:
    """1.5e9, "B/s" -> 1.50 GB/s."""
    if unit == "s":
        return f"{value:.2f} s"
    prefix, size = next(
        ((p, s) for p, s in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)) if value >= s), ("", 1.0)
    )
    return f"{value / size:.3g} {prefix}{unit}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def rate_rows(rates: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("rate", "", "what", "from", box=None, padding=(0, 2, 0, 0))
    for name, row in rates.items():
        table.add_row(name, scaled(row["value"], UNITS.get(name, "B/s")), MEANING[name], row["source"])
    return table


def show_rates(rates: Rates, file: str) -> None:
    """After `pymerge plan --calibrate`."""
    console = standard_output(soft_wrap=True, markup=False)
    console.print(f"measured on {processor()}, kept in {file}")
    console.print(
        rate_rows(
            {name: {"value": getattr(rates, name), "source": rates.source(name)} for name in MEANING if name != "link"}
        )
    )
    kernels = Table("kernel", "a thread", box=None, padding=(0, 2, 0, 0))
    for kind, seconds in rates.kernels.items():
        kernels.add_row(kind, f"{1e9 * seconds:.2f} ns")
    console.print(kernels)


def show_simulation(facts: Mapping[str, Any]) -> None:
    """The curve, what bounds it, and on what it is built."""
    console = standard_output(soft_wrap=True, markup=False)
    cluster = facts["cluster"]
    table = Table("nodes", *COLUMNS.values(), "bound by", "efficiency", box=None, padding=(0, 2, 0, 0))
    for point in facts["curve"]:
        cells = [duration(point[key]) for key in COLUMNS]
        table.add_row(str(point["nodes"]), *cells, WORDS[point["bottleneck"]], f"{100 * point['efficiency']:.0f} %")
    console.print(table)
    console.print(limit_in_words(facts["limit"]))
    gpu, gpus = cluster.get("gpu"), cluster["gpus"]
    workers = f"{gpus} x {gpu['name']} ({gpu['source']})" if gpu else f"{cluster['cores']} core(s)"
    console.print(f"a node: {workers}, {facts['memory'] / 1e9:.1f} GB for what its workers hold at once")
    console.print(rate_rows(cluster["rates"] | ({} if gpu is None else gpu_rows(gpu))))
    for name, what in (("storage", "shared storage, all nodes"), ("net", "network, a node")):
        if cluster[name] is not None:
            console.print(f"{what}: {scaled(cluster[name], 'B/s')}, given")
    console.print(facts["error"])


def gpu_rows(gpu: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    rows = {name: {"value": gpu[name], "source": gpu["source"]} for name in ("single", "double", "memory", "link")}
    return rows | {"eigen": {"value": gpu["eigen"], "source": gpu["eigen_source"]}}


def limit_in_words(limit: Mapping[str, Any]) -> str:
    if limit["nodes"] is None:
        return f"every doubling up to {MOST_NODES} nodes saves {GAIN:.0%} or more"
    why = WORDS[limit["why"]] + (f" ({limit['tensor']})" if limit["why"] == "largest" else "")
    return f"from {limit['nodes']} node(s) on, twice as many save less than {GAIN:.0%}: {why} takes the time"
