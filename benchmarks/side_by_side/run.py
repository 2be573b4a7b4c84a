"""The speed suite: pymerge against every peer, one after the other; results in benchmarks/results/speed.json and .md.

    python benchmarks/side_by_side/run.py [--peers mergekit,fusion_bench] [--quick] [--readme] [--tables]

Each peer's script (COMPARISONS) makes the peer's environment where there is none, runs alone, and writes its rows to
build/speed/. Rows of peers that are not run this time, or fail, are kept from the last results. --readme writes the
tables of README.md. Exit status 1 where a script fails, results differ, or pymerge is slower and causes.json does not
say why.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import rows
import speed_tables as tables
import tools
from rows import REPOSITORY, Row

HERE = Path(__file__).resolve().parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "speed.json"
COMPARISONS = {
    "mergekit": "against_mergekit.py",
    "fusion_bench": "against_fusion_bench.py",
    "sd_mecha": "against_sd_mecha.py",
    "peft": "against_peft.py",
    "pytorch": "against_pytorch.py",
    "assignment": "against_assignment.py",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(COMPARISONS), help=f"of {', '.join(COMPARISONS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repetition: shows that all of it works")
    parser.add_argument("--json", type=Path, help=f"default: {RESULTS}; with --quick: build/speed/quick.json")
    parser.add_argument("--readme", action="store_true", help="write the tables of README.md")
    parser.add_argument(
        "--tables", action="store_true", help="run nothing: the last results, with what causes.json says"
    )
    args = parser.parse_args()
    args.peers = [] if args.tables else args.peers.split(",")
    if unknown := [name for name in args.peers if name not in COMPARISONS]:
        parser.error(f"unknown: {', '.join(unknown)}; peers: {', '.join(COMPARISONS)}")
    if args.quick and args.readme:
        parser.error("--quick measures nothing that belongs into the README")
    args.json = args.json or (REPOSITORY / "build" / "speed" / "quick.json" if args.quick else RESULTS)
    return args


def busy_seconds() -> float:
    """CPU seconds of all processes of this machine since it started; user, nice, system, interrupts, stolen."""
    fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    return sum(os.times()[:4])


def compare(peer: str, quick: bool) -> tuple[dict[str, Any], bool]:
    """The peer's rows with machine, commit, date and what else ran meanwhile; whether its script ended well."""
    path = REPOSITORY / "build" / "speed" / f"{peer}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / COMPARISONS[peer]), "--json", str(path), *(["--quick"] if quick else [])]
    start, busy, own, load = time.monotonic(), busy_seconds(), own_seconds(), os.getloadavg()[0]
    done = subprocess.run(command, cwd=REPOSITORY).returncode == 0
    wall = time.monotonic() - start
    others = (busy_seconds() - busy) - (own_seconds() - own)
    found = {
        **tools.provenance(REPOSITORY),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "quick": quick,
        "seconds": round(wall),
        "load": [load, os.getloadavg()[0]],
        "others": round(max(0.0, others) / wall / (os.cpu_count() or 1), 3),  # share of the processors' time
    }
    return found | {"rows": rows.load(path) if path.is_file() else []}, done


def explained(found: list[Row]) -> list[Row]:
    """Rows in which pymerge is slower get their cause: causes.json has it by peer and method."""
    causes = json.loads((HERE / "causes.json").read_text())
    return [
        replace(row, cause=causes.get(f"{row.peer}: {row.method}", row.cause)) if row.slower() else row for row in found
    ]


def load(path: Path) -> tables.Report:
    """Peer -> its rows and where they come from."""
    report = json.loads(path.read_text()) if path.is_file() else {}
    return {peer: part | {"rows": [rows.from_json(row) for row in part["rows"]]} for peer, part in report.items()}


def save(path: Path, report: tables.Report) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {peer: part | {"rows": [rows.as_json(row) for row in part["rows"]]} for peer, part in report.items()}
    path.write_text(json.dumps(plain, indent=1) + "\n")
    path.with_suffix(".md").write_text(tables.markdown(report))


def problems(report: tables.Report) -> list[str]:
    """What a reader of the results must not find."""
    found = []
    for part in report.values():
        for row in part["rows"]:
            if not row.agrees:
                found.append(f"{row.peer}, {row.method}: results differ")
            if row.slower() and not row.cause and not part["quick"]:
                found.append(f"{row.peer}, {row.method}: slower than {row.strongest()[0]}, and no cause is given")
    return found


def main() -> int:
    args = arguments()
    report, failed = load(args.json), []
    for peer in args.peers:
        print(f"== {peer}", flush=True)
        part, done = compare(peer, args.quick)
        failed += [] if done else [f"{COMPARISONS[peer]} failed"]
        if part["rows"]:
            report[peer] = part
    report = {peer: report[peer] | {"rows": explained(report[peer]["rows"])} for peer in COMPARISONS if peer in report}
    save(args.json, report)
    if args.readme:
        tables.write_readme(REPOSITORY / "README.md", report)
    bad = failed + problems(report)
    print(*bad, f"{args.json} and .md", sep="\n", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
