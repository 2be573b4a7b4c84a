"""Kills merges at random moments and resumes them: the result must be that of an undisturbed merge.

python -m tests.faults.kills --kills 200      # from the project's root; over three methods, about 15 minutes
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from tests.models import family

SHAPES = {"embed.weight": (4000, 256)} | {f"layers.{i}.w": (512, 700 + i) for i in range(20)}
SMALL = {"embed.weight": (400, 128)} | {f"layers.{i}.up.weight": (192, 128 + i) for i in range(16)}
METHODS = {
    "ties": (SHAPES, {"weight": 1.0, "density": 0.3}),
    "linear": (SHAPES, {"weight": 0.5}),
    "tsv_m": (SMALL, {}),
}
OPTIONS = ["--memory", "400MB", "--shard-size", "3MB", "-q"]
COMMAND = [sys.executable, "-m", "pymerge", "merge"]


def checksums(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


def recipe(folder: Path, method: str) -> Path:
    shapes, parameters = METHODS[method]
    base, models = family(folder, 3, shapes)
    raw = {"merge_method": method, "models": [{"model": str(m), "parameters": parameters} for m in models]}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw | ({} if method == "linear" else {"base_model": str(base)})))
    return path


def killed_and_resumed(folder: Path, method: str, kills: int, generator: random.Random) -> dict[str, int]:
    """Kills until so many merges were resumed. Counts of kills, of resumes, of outputs that were there already (killed
    behind the commit), of results that are as they should be, of merges that ended before they were killed."""
    path, counts = recipe(folder, method), {"kills": 0, "resumed": 0, "complete": 0, "identical": 0, "too late": 0}
    subprocess.run([*COMMAND, path, folder / "whole", *OPTIONS], check=True)
    wanted, started = checksums(folder / "whole"), time.monotonic()
    subprocess.run([*COMMAND, path, folder / "timed", *OPTIONS], check=True)
    seconds, out = time.monotonic() - started, folder / "out"
    while counts["resumed"] < kills:
        child = subprocess.Popen([*COMMAND, path, out, *OPTIONS])
        time.sleep(generator.uniform(0.2, 1.0) * seconds)
        child.send_signal(signal.SIGKILL)
        if child.wait() == 0:
            counts["too late"] += 1
        else:
            counts["kills"] += 1
            if out.exists():  # killed behind the commit
                counts["complete"] += 1
            else:
                subprocess.run([*COMMAND, path, out, *OPTIONS], check=True)
                counts["resumed"] += 1
            counts["identical"] += checksums(out) == wanted
        subprocess.run(["rm", "-rf", out, f"{out}.partial"], check=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    for number, method in enumerate(METHODS):
        share = arguments.kills * (number + 1) // len(METHODS) - arguments.kills * number // len(METHODS)
        with tempfile.TemporaryDirectory() as folder:
            print(
                json.dumps({"method": method} | killed_and_resumed(Path(folder), method, share, generator)), flush=True
            )


if __name__ == "__main__":
    main()
