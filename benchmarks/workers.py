"""The other end of method_worker.py: starts it, asks it, gives up on it after a while. Imports nothing large."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from side_by_side.tools import environment

SCRIPT = Path(__file__).resolve().parent / "method_worker.py"


class Failed(Exception):
    """The worker answered with an error, died, or took too long."""


class Worker:
    """One process; `with Worker(...) as worker: worker.ask({...})`."""

    def __init__(
        self, side: str, folder: Path, threads: int, log: Path, python: str = sys.executable, limit: float | None = None
    ) -> None:
        """python is the interpreter of the side's environment; limit: seconds that an answer may take."""
        self.log = log
        self.limit: float | None = None  # imports and loading take what they take
        with open(log, "wb") as sink:
            self.process = subprocess.Popen(
                [python, str(SCRIPT), side, str(folder), "--threads", str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                env=environment(threads),
                text=True,
            )
        self.versions = self._answer()
        self.limit = limit

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer; raises Failed."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], self.limit)
        if not ready:
            raise Failed(f"no answer within {self.limit:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"ended with status {self.process.wait()}: {self.log.read_text(errors='replace')[-2000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
