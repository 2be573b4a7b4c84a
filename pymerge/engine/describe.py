"""Plans, methods and the installation, for people (tables) and for machines (plain data)."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from pymerge.checkpoint import safe_name
from pymerge.engine.observing import observing_bytes
from pymerge.engine.plan import Item, Options, Plan
from pymerge.engine.process import resident_memory
from pymerge.methods import Auto, MethodInfo
from pymerge.version import __version__

# Rates of the 2-core machine that benchmarks/ are run on; a plan's time is an estimate, not a promise.
READ_RATE, WRITE_RATE = 1.5e9, 1.0e9  # bytes a second, cold disk and direct writes
ENTRY_RATE = {"one pass": 2.0e9, "survey": 0.8e9, "generic": 0.3e9}  # task entries a second and thread
FLOP_RATE = 4.0e10  # of the steps for matrices, a second and thread: a third of the float32 product rate
STARTUP = 0.5  # seconds


def work_of(item: Item) -> str:
    """Which rate applies."""
    if item.mode == "generic":
        return "generic"
    return "survey" if item.mode in ("held", "swept") or item.survey_scope is not None else "one pass"


def describe_plan(plan: Plan, options: Options) -> dict[str, Any]:
    """The plan in numbers: bytes, memory, estimated seconds, what is copied, the largest items, notes."""
    compute = sum(item.count * len(item.inputs) / ENTRY_RATE[work_of(item)] for item in plan.items)
    compute += sum(item.spectral_flops for item in plan.items if item.mode == "generic") / FLOP_RATE
    observing = describe_observing(plan)
    compute += observing.get("flops", 0) / FLOP_RATE
    read, write = plan.read_bytes / READ_RATE, plan.write_bytes / WRITE_RATE
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
        "memory_limit": resident_memory() + options.memory_bytes,
        "threads": options.thread_count,
        "seconds": {
            "read": round(read, 2),
            "compute": round(compute / options.thread_count, 2),
            "write": round(write, 2),
            "total": round(STARTUP + max(read, write, compute / options.thread_count), 2),
        },
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


def show_plan(plan: Plan, options: Options) -> None:
    facts, console = describe_plan(plan, options), Console(highlight=False, soft_wrap=True)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    counts, seconds = facts["tensors"], facts["seconds"]
    if "align" in facts:
        table.add_row("align", align_in_words(facts["align"]))
    table.add_row("tensors", f"{counts['merged']} merged, {counts['copied']} copied")
    table.add_row("read", f"{facts['bytes_read'] / 1e9:.2f} GB, about {seconds['read']:.1f} s from disk")
    table.add_row(
        "write", f"{facts['bytes_written'] / 1e9:.2f} GB in {facts['shards']} file(s), about {seconds['write']:.1f} s"
    )
    table.add_row(
        "compute", f"{facts['flops'] / 1e9:.2f} GFLOP, about {seconds['compute']:.1f} s on {facts['threads']} thread(s)"
    )
    if observing := facts.get("observing"):
        read, states = observing["bytes_read"] / 1e9, observing["states"] / 1e6
        table.add_row(
            "observe",
            f"{len(plan.observed)} models side by side, {observing['passes']} pass(es): {read:.2f} GB of weights read, "
            f"{observing['flops'] / 1e9:.2f} GFLOP at most; in memory about {states:.0f} MB of hidden states, "
            f"{observing['moments'] / 1e6:.0f} MB of moments, {observing['weights'] / 1e6:.0f} MB of weights",
        )
    table.add_row("together", f"about {seconds['total']:.1f} s (the three overlap)")
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
    report, console = units.report, Console(highlight=False, soft_wrap=True)
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
    Console(highlight=False, markup=False).print(table)


def plain_method(method: MethodInfo) -> dict[str, Any]:
    """For machines. Defaults that a method works out are in words."""
    plain = asdict(method)
    for p, row in zip(method.parameters, plain["parameters"], strict=True):
        row |= {key: str(value) for key, value in vars(p).items() if isinstance(value, Auto)}
    return plain


def show_method(method: MethodInfo) -> None:
    console = Console(highlight=False, markup=False)
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

    console = Console(highlight=False, markup=False)
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
