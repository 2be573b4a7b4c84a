"""What `pymerge inspect` costs: without spectra against reading the same bytes once, and with spectra by itself.

    python benchmarks/bench_inspect.py DIR [--gb 1.2] [--models 3] [--rounds 3] [--spectra] [--json FILE]

DIR gets a base and its models (side_by_side/checkpoints.py), in the page cache after a first read. Reading is a
process that reads every weight file front to back into one buffer of 8 MiB, as fast as one thread can. Processes are
interleaved; figures are medians. inner: seconds without start-up; wall, cpu: of the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

from side_by_side.checkpoints import make

READ = """
import os, sys, time
start, buffer = time.perf_counter(), memoryview(bytearray(8 << 20))
for path in sys.argv[1:]:
    fd = os.open(path, os.O_RDONLY)
    while os.readv(fd, [buffer]):
        pass
print(time.perf_counter() - start)
"""


def timed(command: list[str]) -> dict[str, float]:
    """Wall seconds, processor seconds and peak memory of a process, and what it prints last."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "import os, subprocess, sys, time; s = time.perf_counter(); p = subprocess.run(sys.argv[1:], check=True, "
    code += "stdout=subprocess.PIPE, text=True); import resource as r; print(p.stdout.split()[-1], "
    code += "time.perf_counter() - s, r.getrusage(r.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, stdout=subprocess.PIPE, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    inner, wall, peak = map(float, done.stdout.split()[-3:])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"inner": inner, "wall": wall, "cpu": cpu, "peak": peak}


def inspected(folders: list[str], threads: int, *, spectra: bool) -> list[str]:
    code = (
        "import sys, pymerge; f = sys.argv[1:]\n"
        f"o = pymerge.Options(threads={threads}, progress=False)\n"
        f"print(pymerge.inspect(f[0], f[1:], spectra={spectra}, options=o).seconds)"
    )
    return [sys.executable, "-c", code, *folders]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--gb", type=float, default=1.2)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--spectra", action="store_true", help="Also with spectra, once.")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    make(args.root, args.gb, args.models, 5.0)
    folders = [str(args.root / name) for name in ["base", *(f"m{i + 1}" for i in range(args.models))]]
    files = [str(path) for folder in folders for path in sorted(Path(folder).glob("*.safetensors"))]
    read, inspect = [sys.executable, "-c", READ, *files], inspected(folders, args.threads, spectra=False)
    timed(read)
    rows: dict[str, list[dict[str, float]]] = {"read": [], "inspect": []}
    for _ in range(args.rounds):
        rows["read"].append(timed(read))
        rows["inspect"].append(timed(inspect))
    middle = {name: {key: median(row[key] for row in found) for key in found[0]} for name, found in rows.items()}
    result = {
        "bytes": sum(os.path.getsize(path) for path in files),
        "checkpoints": len(folders),
        "threads": args.threads,
        "rounds": args.rounds,
        "load": os.getloadavg()[0],
        **middle,
        "ratio": {key: middle["inspect"][key] / middle["read"][key] for key in ("inner", "wall", "cpu")},
    }
    if args.spectra:
        result["with_spectra"] = timed(inspected(folders, args.threads, spectra=True))
    text = json.dumps(result, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
