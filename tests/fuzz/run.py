"""Coverage-guided fuzzing of one parser, by atheris (libFuzzer): `make fuzz`, or for hours

    python tests/fuzz/run.py TARGET --runs 0 [--keep FOLDER]

Fails on an exception that is no error of pymerge, on an input that takes more than 2 seconds, and when the process
grows by more than 200 MB. The last line is JSON: executions, accepted, growth of memory. An input that fails is left in
the working folder as crash-*, to be put into the corpus.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pymerge"]):
    import targets

HERE = Path(__file__).parent
WARM = 2000  # executions until memory is compared
GROWTH = 200 << 20  # bytes
SECONDS = 2  # an input may take


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Counter:
    """Runs a target; counts, and watches the memory of the process."""

    def __init__(self, target: str, runs: int) -> None:
        self.target, self.runs = target, runs
        self.executions = self.accepted = self.warm = 0

    def __call__(self, data: bytes) -> None:
        self.executions += 1
        self.accepted += targets.run(self.target, data)
        if self.executions == WARM:
            self.warm = resident()
        if self.executions % 1000 == 0 and self.warm:
            assert resident() - self.warm < GROWTH, f"grew by {(resident() - self.warm) >> 20} MB"
        if self.executions == self.runs:
            self.report()

    def report(self) -> None:
        growth = resident() - self.warm if self.warm else 0
        counts = {"target": self.target, "executions": self.executions, "accepted": self.accepted}
        print(json.dumps(counts | {"growth_mb": round(growth / 1e6, 1)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=targets.TARGETS)
    parser.add_argument("--runs", type=int, default=10_000, help="0: until it is stopped")
    parser.add_argument("--keep", help="folder in which inputs that reach new code are kept")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = arguments.keep or scratch
        os.makedirs(found, exist_ok=True)
        options = [f"-runs={arguments.runs or -1}", f"-seed={arguments.seed}", f"-timeout={SECONDS}", "-max_len=8192"]
        options += ["-print_final_stats=0", "-verbosity=0", "-close_fd_mask=0"]
        corpus = [found, str(HERE / "corpus" / arguments.target)]
        atheris.Setup([sys.argv[0], *options, *corpus], Counter(arguments.target, arguments.runs))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
