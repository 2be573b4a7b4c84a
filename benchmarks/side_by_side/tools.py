"""The programs that are compared: how each is called, and what a run of it costs.

Imports nothing large: on Linux a child's peak RSS starts at what its parent held.
"""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"
MERGEKIT = "mergekit==0.1.5"
FUSION_BENCH = "fusion_bench==0.2.33"
# Every input folder is beside the recipes; three fine-tuned models and a base (PAIRS: the base and one of them;
# nuslerp: the base and two; linear and karcher: no base; passthrough: one model).
PAIRS = ("slerp", "nearswap", "arcee_fusion")
TASKS = ("m1", "m2", "m3")
METHODS: dict[str, dict] = {
    "linear": {"weight": 1.0},
    "task_arithmetic": {"weight": 0.4},
    "slerp": {"t": 0.4},
    "ties": {"weight": 0.5, "density": 0.2},
    "dare_linear": {"weight": 0.4, "density": 0.5},
    "dare_ties": {"weight": 0.4, "density": 0.5},
    "breadcrumbs": {"weight": 0.4, "density": 0.9, "gamma": 0.01},
    "breadcrumbs_ties": {"weight": 0.4, "density": 0.9, "gamma": 0.01},
    "nuslerp": {"weight": 0.5},
    "multislerp": {"weight": 0.5},
    "karcher": {},
    "model_stock": {},
    "della_linear": {"weight": 0.4, "density": 0.5, "epsilon": 0.2},
    "della": {"weight": 0.4, "density": 0.5, "epsilon": 0.2},
    "sce": {"select_topk": 1.0},
    "nearswap": {"t": 0.001},
    "arcee_fusion": {},
    "ram": {"epsilon": 1e-5},
    "ramplus_tl": {"epsilon": 1e-5},
    "passthrough": {},
}
RANDOM = ("dare_linear", "dare_ties", "della_linear", "della")


@dataclass(frozen=True)
class Cost:
    """One run of one program."""

    wall: float  # seconds
    cpu: float  # user + system seconds, children included
    rss: int  # bytes, peak
    read: int  # bytes from storage: what the page cache holds is not counted
    written: int  # bytes to storage


def recipe_models(method: str) -> tuple[str, ...]:
    """The folders that a recipe reads."""
    few = dict.fromkeys(PAIRS, ("base", "m1")) | {"linear": TASKS, "karcher": TASKS, "nuslerp": ("base", "m1", "m2")}
    return (few | {"passthrough": TASKS[:1]}).get(method, ("base", *TASKS))


def write_recipe(root: Path, method: str, dtype: str) -> Path:
    """The YAML that both programs run, unchanged."""
    values = "{" + ", ".join(f"{k}: {v}" for k, v in METHODS[method].items()) + "}"
    weighted = "weight" in METHODS[method]  # then each model has its values
    lines = [f"merge_method: {method}", f"dtype: {dtype}", "models:"]
    for model in recipe_models(method):
        if model == "base" and method != "slerp":
            continue
        lines.append(f"  - model: {root / model}")
        if weighted:
            lines.append(f"    parameters: {values}")
    if "base" in recipe_models(method):
        lines.append(f"base_model: {root / 'base'}")
    if not weighted:
        lines.append(f"parameters: {values}")
    path = root / f"{method}.{dtype}.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def environment(threads: int) -> dict[str, str]:
    """The same for every program: threads pinned, no network."""
    pinned = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return os.environ | pinned | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def pymerge_command(recipe: Path, out: Path, threads: int) -> list[str]:
    return [sys.executable, "-m", "pymerge", "merge", str(recipe), str(out), "--threads", str(threads)]


def floor_command(recipe: Path, out: Path, threads: int) -> list[str]:
    """The same reads and writes with no arithmetic between them."""
    return [sys.executable, "-m", "pymerge.engine.floor", str(recipe), str(out), "--threads", str(threads)]


def mergekit_command(venv: Path, recipe: Path, out: Path) -> list[str]:
    return [str(venv / "bin" / "mergekit-yaml"), str(recipe), str(out), "--no-copy-tokenizer", "--quiet"]


def copy_command(source: Path, out: Path) -> list[str]:
    return ["cp", "-r", "--reflink=never", str(source), str(out)]


def synced_copy_command(source: Path, out: Path) -> list[str]:
    return ["sh", "-c", 'cp -r --reflink=never "$0" "$1" && sync "$1"/*', str(source), str(out)]


def make_mergekit(venv: Path) -> None:
    if not (venv / "bin" / "mergekit-yaml").exists():
        make_environment(venv, MERGEKIT)


def make_fusion_bench(venv: Path) -> None:
    if not (venv / "bin" / "fusion_bench").exists():
        make_environment(venv, FUSION_BENCH)


def make_environment(venv: Path, *packages: str) -> None:
    """Packages in an environment of their own; torch first, at pymerge's version, so that both run on the same one."""
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    constraint = venv / "constraints.txt"
    constraint.write_text(TORCH + "\n")
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    for requirements in ([TORCH], packages):
        subprocess.run([*pip, "-c", str(constraint), *requirements], check=True)


def warm(folders: list[Path]) -> None:
    """Brings every file into the page cache, and earlier writes out of the way."""
    os.sync()
    buffer = bytearray(1 << 22)
    for folder in folders:
        for path in sorted(folder.iterdir()):
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def evict(folders: list[Path]) -> None:
    """Takes every file out of the page cache, so that reading it is reading from storage."""
    os.sync()
    for folder in folders:
        for path in sorted(folder.iterdir()):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(command: list[str], out: Path, threads: int) -> Cost:
    """Runs a program that makes `out`; its output is kept for the error message alone."""
    shutil.rmtree(out, ignore_errors=True)
    log = out.with_suffix(".log")
    with open(log, "wb") as sink:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment(threads))
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}\n{tail}")
    return Cost(
        wall=wall,
        cpu=usage.ru_utime + usage.ru_stime,
        rss=usage.ru_maxrss * 1024,
        read=usage.ru_inblock * 512,
        written=usage.ru_oublock * 512,
    )


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} CPUs" if names else platform.machine()


def provenance(repository: Path) -> dict[str, str]:
    """Where and when figures were taken, for their report."""
    return {
        "processor": processor(),
        "commit": commit(repository),
        "date": datetime.date.today().isoformat(),
    }


def commit(repository: Path) -> str:
    git = subprocess.run(["git", "-C", str(repository), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return git.stdout.strip() or "unknown"
