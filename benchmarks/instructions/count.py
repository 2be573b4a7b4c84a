"""Instructions that each CPU kernel takes on its AVX2 path, held against benchmarks/results/instructions.json.

    make instructions             fails where a kernel takes over 10 % more instructions than its baseline
    make instructions ACCEPT=1    what is counted now becomes the baseline

driver.cpp and the kernels of csrc/cpu are compiled without torch, with the flags of setup.py, and run under callgrind.
Counts do not depend on the machine's load or CPU, but on compiler, C library and valgrind: where one of these is not
the baseline's, and where valgrind or AVX2 is missing, the check says so and passes.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BASELINE = ROOT / "benchmarks" / "results" / "instructions.json"
KERNELS = (
    "level_avx2 delta_merge delta_kth gather scaled crc32c projection_levels_ops gram64_levels_ops sketch_levels_ops "
    "cov_avx2_ops assign_scans_ops assign_solve_ops assign_lists_ops"
).split()
SOURCES = [HERE / "driver.cpp", *(ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in KERNELS)]
COMPILER = os.environ.get("CXX", "g++")
NO_AVX2 = 3  # exit code of the driver
LIMIT = 1.1  # of the baseline


class NotHereError(Exception):
    """Why nothing can be counted on this machine."""


def flags() -> list[str]:
    """FLAGS of setup.py, which cannot be imported."""
    names: dict[str, list[str]] = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("WARNINGS", "FLAGS"):
            exec(compile(ast.Module([node], []), "setup.py", "exec"), names)
    return names["FLAGS"]


def build(folder: Path) -> Path:
    """The driver, from sources compiled side by side."""
    options = [*flags(), "-I", str(ROOT / "csrc")]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([COMPILER, *options, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, SOURCES))
    subprocess.run([COMPILER, *objects, "-o", folder / "driver"], check=True)
    return folder / "driver"


def toolchain() -> str:
    """What counts depend on beside the sources."""

    def version(program: str) -> str:
        told = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
        return told.splitlines()[0]

    return ", ".join([version(COMPILER), version("valgrind"), " ".join(platform.libc_ver())])


def count(driver: Path) -> dict[str, int]:
    """Instructions by kernel."""
    found = driver.parent / "callgrind.out"
    command = ["valgrind", "--tool=callgrind", "--toggle-collect=measured", "--dump-after=measured"]
    command += ["--combine-dumps=yes", f"--callgrind-out-file={found}", str(driver)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode == NO_AVX2:
        raise NotHereError("this CPU, or valgrind on it, has no AVX2")
    if run.returncode != 0:
        raise SystemExit(f"instructions: the driver ended with {run.returncode} under valgrind\n{run.stderr[-2000:]}")
    part = r"^desc: Trigger: --dump-after=measured$.*?^totals: (\d+)$"
    totals = re.findall(part, found.read_text(), re.MULTILINE | re.DOTALL)
    return dict(zip(run.stdout.splitlines(), map(int, totals), strict=True))


def measure() -> dict:
    """What is counted now, in the form of the baseline."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise NotHereError(f"{platform.system()} on {platform.machine()}, the baseline is of Linux on x86_64")
    if shutil.which("valgrind") is None:
        raise NotHereError("valgrind is not installed (apt-get install valgrind)")
    with tempfile.TemporaryDirectory() as temporary:
        return {"toolchain": toolchain(), "instructions": count(build(Path(temporary)))}


def compare(baseline: dict, now: dict) -> list[str]:
    """What is wrong with the counts of now; prints the other differences."""
    before, after = baseline["instructions"], now["instructions"]
    wrong = [f"{name}: in the baseline, not counted now" for name in before if name not in after]
    for name, found in after.items():
        if name not in before:
            wrong.append(f"{name}: {found:,} instructions, not in the baseline")
            continue
        line = f"{name}: baseline {before[name]:,}, now {found:,} instructions ({found / before[name] - 1:+.1%})"
        if found > LIMIT * before[name]:
            wrong.append(line)
        elif found != before[name]:
            print(line)
    return wrong


def check(baseline: dict, now: dict) -> int:
    """Exit code: 1 where a kernel takes too many instructions."""
    wrong = compare(baseline, now)
    if baseline["toolchain"] != now["toolchain"]:
        print(*wrong, f"instructions: only reported: the baseline is of {baseline['toolchain']}", sep="\n")
        print(f"here: {now['toolchain']}")
        return 0
    if wrong:
        print("instructions: FAILED", *wrong, "if that is meant: make instructions ACCEPT=1", sep="\n  ")
        return 1
    print(f"instructions: {len(now['instructions'])} kernels within {LIMIT - 1:.0%} of the baseline")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accept", action="store_true", help="write the baseline")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    args = parser.parse_args()
    try:
        now = measure()
    except NotHereError as error:
        print(f"instructions: not counted: {error}")
        return 0
    if args.accept:
        args.baseline.write_text(json.dumps(now, indent=1) + "\n")
        print(f"instructions: wrote {args.baseline}")
        return 0
    return check(json.loads(args.baseline.read_text()), now)


if __name__ == "__main__":
    sys.exit(main())
