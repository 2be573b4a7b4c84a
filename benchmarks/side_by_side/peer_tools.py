"""What the comparisons with single libraries share: the peers' environment, interleaved timing, memory, peaks."""

from __future__ import annotations

import ctypes
import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rows
import tools
from rows import REPOSITORY, Row, Runs

PEERS = REPOSITORY / ".venv-peers"
SD_MECHA = "sd-mecha==1.1.8"
LAPS = {"lap": "lap==0.5.13", "lapx": "lapx==0.11.1"}
WARM = 1.0  # CPU seconds from which a first run is a run like any other
SHORT = 0.02  # CPU seconds that a turn takes at least
LONG = 15.0  # seconds from which a whole program runs once with its inputs in the page cache


def make_peers() -> None:
    """sd-mecha in an environment of its own; lap and lapx, which install the same module, each in a folder of it."""
    if not any(PEERS.glob("lib/*/site-packages/sd_mecha")):
        tools.make_environment(PEERS, SD_MECHA)
    for name, requirement in LAPS.items():
        if not (PEERS / name).exists():
            pip = [str(PEERS / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
            subprocess.run([*pip, "--no-deps", "--target", str(PEERS / name), requirement], check=True)


def show(found: list[Row]) -> None:
    """A line a row: pymerge's seconds, each opponent's as a multiple of them, agreement."""
    for row in found:
        ours = row.seconds(row.pymerge)
        others = [f"{name} {row.seconds(runs) / ours:.2f}x" for name, runs in (row.opponents | row.floors).items()]
        apart = "" if row.difference is None else f"difference {row.difference:.1e}, "
        print(
            f"{row.method} {row.setting}: {ours:.4f} s {row.measure}; {', '.join(others)}; {apart}agrees: {row.agrees}"
        )


def one_core() -> None:
    """This process on one core, with one thread."""
    import torch

    rows.pin(1)
    torch.set_num_threads(1)


def programs_in_turns(
    commands: Mapping[str, list[str]],
    floors: Mapping[str, list[str]],
    inputs: list[Path],
    out: Path,
    reps: Mapping[str, int],
    threads: int,
) -> dict[str, Runs]:
    """Whole programs that read `inputs` and write the folder `out`: first each of `commands` once with the inputs out
    of the page cache, for its bytes; then all of them `reps` times with the inputs in it, taking turns. What took more
    than LONG the first time has one turn."""

    def run(command: list[str]) -> tools.Cost:
        cost = tools.run(command, out, threads)
        shutil.rmtree(out)
        return cost

    cold = {}
    for name, command in commands.items():
        tools.evict(inputs)
        cold[name] = run(command)
    turns = dict(reps) | {name: 1 for name, cost in cold.items() if cost.wall > LONG}
    costs: dict[str, list[tools.Cost]] = {name: [] for name in turns}
    for turn in range(max(turns.values())):
        for name, command in {**commands, **floors}.items():
            if turn < turns[name]:
                tools.warm(inputs)
                costs[name].append(run(command))
    return {
        name: Runs(
            wall=[cost.wall for cost in found],
            cpu=[cost.cpu for cost in found],
            rss=max(cost.rss for cost in found),
            read=cold[name].read if name in cold else None,
            written=cold[name].written if name in cold else None,
        )
        for name, found in costs.items()
    }


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measured(call: Callable[[], Any]) -> tuple[Any, float, float, int, int]:
    """The result; wall and CPU seconds; bytes of peak resident memory, and how far above what was held before."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that earlier calls gave back is not to be reused unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before, wall, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    result = call()
    cpu, wall, peak = time.process_time() - cpu, time.perf_counter() - wall, resident("VmHWM")
    return result, wall, cpu, peak, peak - before


def take_turns(candidates: Mapping[str, Callable[[], Any]], reps: int) -> tuple[dict[str, Runs], dict[str, Any]]:
    """Every candidate `reps` times in this process, taking turns; memory and result are those of the first round.

    A turn of what takes less than SHORT seconds is as many calls in a row as fill them: it then finds its inputs and
    its code in the caches, whoever ran before. The first run of what takes less than WARM does not count: it pays for
    first uses."""
    first = {name: measured(call) for name, call in candidates.items()}
    calls, times = {}, {}
    for name, (_, wall, cpu, _, _) in first.items():
        calls[name] = 1 if cpu >= SHORT else math.ceil(SHORT / max(cpu, SHORT / 1000))
        times[name] = [(wall, cpu)] if cpu >= WARM else []
    while any(len(taken) < reps for taken in times.values()):
        for name, call in candidates.items():
            if len(times[name]) < reps:
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(calls[name]):
                    call()
                cpu = time.process_time() - cpu
                times[name].append(((time.perf_counter() - wall) / calls[name], cpu / calls[name]))
    runs = {
        name: Runs(wall=[wall for wall, _ in taken], cpu=[cpu for _, cpu in taken], rss=peak, growth=growth)
        for (name, taken), (_, _, _, peak, growth) in zip(times.items(), first.values(), strict=True)
    }
    return runs, {name: found[0] for name, found in first.items()}


def relative(found: Any, expected: Any) -> float:
    """||found - expected|| / ||expected||, Frobenius, in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@dataclass(frozen=True)
class Peaks:
    """What one core does here: GFLOP/s of square products by precision, GB/s of a copy (bytes read plus written)."""

    single: float
    double: float
    half: float  # bfloat16
    copy: float

    def floor(self, *, single: float = 0.0, double: float = 0.0, half: float = 0.0) -> Runs:
        """A bound from operations (a multiplication and an addition are two) of products at this speed."""
        seconds = single / self.single / 1e9 + double / self.double / 1e9 + half / self.half / 1e9
        return Runs(wall=[seconds], cpu=[seconds], rss=0)

    def copied(self, nbytes: float) -> Runs:
        """A bound from bytes that are read or written once."""
        seconds = nbytes / self.copy / 1e9
        return Runs(wall=[seconds], cpu=[seconds], rss=0)


def peaks(side: int = 2048, nbytes: int = 1 << 28, reps: int = 5) -> Peaks:
    """Medians over `reps` rounds of products of `side` and copies of `nbytes`, in turns."""
    import torch

    kinds = {"single": torch.float32, "double": torch.float64, "half": torch.bfloat16}
    factors = {kind: torch.randn(side, side).to(dtype) for kind, dtype in kinds.items()}
    source = torch.randint(256, (nbytes,), dtype=torch.uint8)
    target = torch.empty_like(source)
    candidates: dict[str, Callable[[], Any]] = {kind: lambda x=x: x @ x for kind, x in factors.items()}
    runs, _ = take_turns(candidates | {"copy": lambda: target.copy_(source)}, reps)
    rate = {name: 2e-9 * (nbytes if name == "copy" else side**3) / statistics.median(r.cpu) for name, r in runs.items()}
    return Peaks(**rate)
