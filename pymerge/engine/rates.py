"""How fast a machine reads, computes and writes: built in, measured here (`engine.calibrate`), or given."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pymerge.errors import RecipeError
from pymerge.version import __version__

# Seconds of one thread for an entry (`entry`: base, rounding, checksum; the others: for an entry of each task, `asked`:
# for each task of a tensor in memory that is asked for a rank).
KERNELS = {
    "entry": 1.5e-9,
    "task": 0.35e-9,
    "random": 1.0e-9,
    "elect": 0.3e-9,
    "cut": 0.3e-9,
    "kth": 0.4e-9,
    "asked": 4.0e-4,
    "gram": 0.5e-9,
    "l1": 0.5e-9,
    "signs": 0.8e-9,
    "histogram": 1.2e-9,
}
WORD = 8.0  # bits of a byte, for network rates


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one machine. The defaults are those of the 2-core machine that benchmarks/ are run on.

    single, double, eigen  operations a second and thread: see `methods.work`
    touch                  bytes a second and thread that plain tensor operations read and write
    kernels                seconds a thread takes for an entry: see KERNELS
    cached, disk, write    bytes a second: reading from the page cache, reading what is not in it, writing
    moved                  bytes a second and thread that a merge reads and writes, arithmetic apart
    memory                 bytes a second that all threads together read and write
    start, torch           seconds until a merge has begun and after it has ended, without and with torch
    sources                where each rate is from, by its name; those that are not in it are built in
    """

    single: float = 8.0e10
    double: float = 4.0e10
    eigen: float = 5e10
    touch: float = 4.0e9
    kernels: Mapping[str, float] = field(default_factory=lambda: dict(KERNELS))
    cached: float = 4.0e9
    disk: float = 1.5e9
    write: float = 1.0e9
    moved: float = 4.0e9
    memory: float = 2.0e10
    start: float = 0.5
    torch: float = 2.0
    sources: Mapping[str, str] = field(default_factory=dict)

    def source(self, name: str) -> str:
        return self.sources.get(name, "built in")

    def given(self, values: Mapping[str, float], source: str = "given") -> Rates:
        """With other values for some rates."""
        return replace(self, **values, sources={**self.sources, **dict.fromkeys(values, source)})

    def save(self) -> Path:
        """Keeps them for `known_rates`. Returns the file."""
        path = rates_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f"{path.name}.{os.getpid()}.partial")
        staged.write_text(json.dumps(machine() | {"rates": asdict(self)}, indent=1) + "\n")
        staged.replace(path)
        return path


def known_rates() -> Rates:
    """Those measured on this machine by this version, else those built in."""
    try:
        found = json.loads(rates_file().read_text())
        if {key: found[key] for key in machine()} == machine():
            return Rates(**found["rates"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none were measured, or by another version: then the built-in ones hold
    return Rates()


def rates_file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pymerge" / "rates.json"


def machine() -> dict[str, Any]:
    """What measured rates hold for."""
    return {"pymerge": __version__, "processor": processor(), "processors": len(os.sched_getaffinity(0))}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


_PREFIX = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_UNITS = {
    "B/s": r"([0-9]+(?:\.[0-9]+)?)\s*([KMGTP])(iB|B|bit)/s",
    "FLOP/s": r"([0-9]+(?:\.[0-9]+)?)\s*([KMGTP])(FLOP)/s",
}
_EXAMPLES = {"B/s": "5GB/s, 5GiB/s or 100Gbit/s", "FLOP/s": "60TFLOP/s"}


def parse_rate(name: str, text: str, unit: str) -> float:
    """`5GB/s`, `5GiB/s` and `100Gbit/s` in bytes a second (unit "B/s"), `60TFLOP/s` in operations a second.

    Raises   RecipeError: a number without its unit says nothing, and neither does Gb/s."""
    match = re.fullmatch(_UNITS[unit], text.strip())
    value = float(match[1]) * _PREFIX[match[2]] if match else 0.0
    if not match or not value > 0:
        raise RecipeError(
            f"{name}: {text!r} is no rate: write a number above 0 with its unit, such as {_EXAMPLES[unit]}"
        )
    if match[3] == "iB":
        value *= (1024 / 1000) ** (1 + "KMGTP".index(match[2]))
    return value / WORD if match[3] == "bit" else value
