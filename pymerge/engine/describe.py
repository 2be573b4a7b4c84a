"""Plans, methods and the installation, for people (tables) and for machines (plain data)."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from pymerge.checkpoint import safe_name
from pymerge.engine.console import standard_output
from pymerge.engine.devices import HOST
from pymerge.engine.observing import observing_bytes
from pymerge.engine.plan import Options, Plan
from pymerge.engine.process import resident_memory
from pymerge.engine.rates import known_rates
from pymerge.engine.simulate import local
from pymerge.methods import Auto, MethodInfo
from pymerge.version import __version__


def describe_plan(plan: Plan, options: Options, *, made_up: bool = False) -> dict[str, Any]:
    """The plan in numbers: bytes, memory, estimated seconds, what is copied, the largest items, notes.

    made_up  the models are shapes alone: no limit of memory is meant, and there is nothing to run"""
    rates = known_rates()
    observing = describe_observing(plan)
    seconds = local(plan, options, rates).seconds
    if plan.devices:
        here = replace(plan, items=tuple(item for item in plan.items if item.device == HOST))
        busy = [local(here, options, rates).seconds["compute"], *(device.seconds for device in plan.devices)]
        longest = max(seconds["read"], seconds["write"], *busy)
        seconds |= {"compute": max(busy), "total": seconds["start"] + longest}
    observed = observing.get("flops", 0) / rates.single / options.thread_count
    modes: dict[str, int] = {}
    for item in plan.items:
        modes[item.mode] = modes.get(item.mode, 0) + 1
    largest = sorted(plan.items, key=lambda item: -item.read_bytes)[:5]
    return {
        **({"align": {"recipe": plan.recipe.align.plain()} | dict(plan.alignment or {})} if plan.recipe.align else {}),
        **({"vocabulary": plan.vocabulary} if plan.vocabulary is not None else {}),
        "tensors": plan.counts,
        "items": modes,
        "bytes_read": plan.read_bytes,
        "bytes_written": plan.write_bytes,
        "flops": sum(item.flops for item in plan.items),
        "shards": len(plan.layout.shards),
        "memory_limit": None if made_up else resident_memory() + options.memory_bytes,
        "threads": options.thread_count,
        **({"devices": [device.plain() for device in plan.devices]} if plan.devices else {}),
        "seconds": {
            "read": round(seconds["read"], 2),
            "compute": round(seconds["compute"] + observed, 2),
            "write": round(seconds["write"], 2),
            "total": round(seconds["total"] + observed, 2),
        },
        "rates": rates.source("single"),
        "largest": [
            {
                "name": safe_name(i.entry.name),
                "shape": list(i.entry.shape),
                "bytes_read": i.read_bytes,
                "peak_bytes": i.peak_bytes,
                "how": i.mode,
            }
            for i in largest
        ],
        "notes": plan.notes,
    } | ({"observing": observing} if observing else {})


def describe_observing(plan: Plan) -> dict[str, int]:
    """What it takes to run the models over their samples: passes over all layers, bytes of weights that these read,
    estimates of operations and of memory."""
    if not plan.observed:
        return {}
    passes = max((1 + item.survey_reads for item in plan.items if item.entry.inputs), default=0)
    weights = sum(found.run.forwards * found.run.checkpoint.nbytes for found in plan.observed)
    flops = sum(found.flops for found in plan.observed)
    work = {"passes": passes, "bytes_read": passes * weights, "flops": passes * flops}
    return work | observing_bytes(plan.observed)


def show_plan(plan: Plan, options: Options, *, made_up: bool = False) -> None:
    facts, console = describe_plan(plan, options, made_up=made_up), standard_output(soft_wrap=True)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    counts, seconds = facts["tensors"], facts["seconds"]
    rates = "measured here" if facts["rates"] == "measured" else "built in, `pymerge plan --calibrate` measures yours"
    if "align" in facts:
        table.add_row("align", align_in_words(facts["align"]))
    table.add_row("tensors", f"{counts['merged']} merged, {counts['copied']} copied")
    table.add_row("read", f"{facts['bytes_read'] / 1e9:.2f} GB, about {seconds['read']:.1f} s")
    table.add_row(
        "write", f"{facts['bytes_written'] / 1e9:.2f} GB in {facts['shards']} file(s), about {seconds['write']:.1f} s"
    )
    table.add_row(
        "compute",
        f"{facts['flops'] / 1e9:.2f} GFLOP, about {seconds['compute']:.1f} s on {facts['threads']} thread(s)"
        + "".join(f", {device['name']}" for device in facts.get("devices", ())),
    )
    if observing := facts.get("observing"):
        read, states = observing["bytes_read"] / 1e9, observing["states"] / 1e6
        table.add_row(
            "observe",
            f"{len(plan.observed)} models side by side, {observing['passes']} pass(es): {read:.2f} GB of weights read, "
            f"{observing['flops'] / 1e9:.2f} GFLOP at most; in memory about {states:.0f} MB of hidden states, "
            f"{observing['moments'] / 1e6:.0f} MB of moments, {observing['weights'] / 1e6:.0f} MB of weights",
        )
    for device in facts.get("devices", ()):
        table.add_row(
            device["name"],
            f"{device['items']} items, {device['bytes'] / 1e9:.2f} GB, {device['flops'] / 1e9:.2f} GFLOP, "
            f"memory at most {device['peak_bytes'] / 1e9:.2f} GB",
        )
    table.add_row("together", f"about {seconds['total']:.1f} s (the three overlap; rates: {rates})")
    if not made_up:
        table.add_row("memory", f"at most {facts['memory_limit'] / 1e9:.2f} GB")
    console.print(table)
    biggest = Table("largest tensors", "shape", "read", "in memory", "how", box=None, padding=(0, 2, 0, 0))
    for item in facts["largest"]:
        biggest.add_row(
            item["name"],
            str(item["shape"]),
            f"{item['bytes_read'] / 1e6:.1f} MB",
            f"{item['peak_bytes'] / 1e6:.1f} MB",
            item["how"],
        )
    console.print(biggest)
    for note in facts["notes"]:
        console.print(f"note: {note}", markup=False)
    if not made_up:
        console.print("no problems found: `pymerge merge` will run this")


def align_in_words(facts: dict[str, Any]) -> str:
    """One line of a plan."""
    recipe, groups = facts["recipe"], facts.get("groups")
    if groups is None:
        data = f"weights and what the units see of {recipe['data']}" if "data" in recipe else "weights alone"
        return f"permutations are found first, by {data}"
    moved = sum(sum(row["moved"]) for row in groups.values() if "moved" in row)
    units = sum(row["units"] for row in groups.values()) * (len(facts["models"]) - 1)
    return f"{moved} of {units} units move in {len(groups)} groups" if moved else f"{len(groups)} groups"


def show_alignment(units: Any) -> None:
    """What a search found, group by group: units moved in each model but the first, similarity before and after, bound
    on what an assignment may lack. Of a zip only the similarity that it reached."""
    report, console = units.report, standard_output(soft_wrap=True)
    table = Table(
        Column("group", overflow="fold"), "units", "moved", "before", "after", "gap", box=None, padding=(0, 2, 0, 0)
    )
    for name, row in report["groups"].items():
        cells = [", ".join(shown.format(value) for value in row.get(key, ())) for key, shown in CELLS.items()]
        gaps = [gap for gap in row.get("gap", ()) if gap is not None]
        table.add_row(safe_name(name), str(row["units"]), *cells, f"{max(gaps):.1g}" if gaps else "")
    console.print(table)
    before = f"{report['before']:.4f} -> " if "before" in report else ""
    console.print(
        f"similarity {before}{report['after']:.4f}; alpha {report['alpha']:g}, {report['sweeps']} sweep(s), "
        f"{report['assignments']} assignments solved"
    )


CELLS = {"moved": "{}", "before": "{:.3f}", "after": "{:.3f}"}


def show_methods(methods: list[MethodInfo]) -> None:
    table = Table("step", "method", "what it does", "data", "paper", box=None, padding=(0, 2, 0, 0))
    for method in methods:
        data, source = ", ".join(method.needs) or "none", method.paper or method.package
        table.add_row(method.step, method.name, method.summary, data, source)
    standard_output(markup=False).print(table)


def plain_method(method: MethodInfo) -> dict[str, Any]:
    """For machines. Defaults that a method works out are in words."""
    plain = asdict(method)
    for p, row in zip(method.parameters, plain["parameters"], strict=True):
        row |= {key: str(value) for key, value in vars(p).items() if isinstance(value, Auto)}
    return plain


def show_method(method: MethodInfo) -> None:
    console = standard_output(markup=False)
    console.print(f"{method.name} ({method.step}): {method.summary}")
    console.print(f"paper: {method.paper or 'none'}; data: {', '.join(method.needs) or 'none'}; base: {method.base}")
    if method.package:
        console.print(f"from the package {method.package}")
    table = Table("parameter", "default", "in YAML", "range", "meaning", box=None, padding=(0, 2, 0, 0))
    for p in method.parameters:
        defaults = ["required" if d is None else str(d) for d in (p.default, p.mergekit_default)]
        table.add_row(p.name, *defaults, p.range, p.doc + (" (one, or one a model)" if p.per_model else ""))
    console.print(table)


def show_info(fast: bool) -> None:
    """Versions, processor, and where each operator is native."""
    from pymerge import _C

    console = standard_output(markup=False)
    console.print(f"pymerge {__version__}, Python {platform.python_version()}, {platform.platform()}")
    console.print(f"processor path {_C.cpu_level()} (PYMERGE_CPU overrides), {len(os.sched_getaffinity(0))} processors")
    console.print("transformers " + ("found" if importlib.util.find_spec("transformers") else "not installed"))
    if fast:
        return
    import torch

    from pymerge import ops

    found = re.findall(r"(BLAS|LAPACK)_INFO=(\w+)", torch.__config__.show())
    linear_algebra = ", ".join(f"{what} {library}" for what, library in found)
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {linear_algebra}")
    libraries = sorted(path.name for path in Path(str(_C.__file__)).parent.glob("_ops*.so"))
    console.print(f"operator libraries {', '.join(libraries)}")
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        console.print(f"cuda:{number} {device.name}, {device.total_memory / 1e9:.0f} GB, {device.major}.{device.minor}")
    if not torch.cuda.is_available():
        console.print("cuda not available")
    table = Table("operator", "cpu", "cuda", box=None, padding=(0, 2, 0, 0))
    for name, runs in ops.implementations().items():
        table.add_row(name, runs["cpu"], runs["cuda"])
    console.print(table)
