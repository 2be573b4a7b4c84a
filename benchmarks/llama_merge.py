"""A whole Llama-3.2-1B-shaped merge from disk to disk: ACE, and TSV-M with SVC.

    python benchmarks/llama_merge.py [--layers 16] [--threads 1] [--memory 2.8GB] [--keep]

Checkpoints of 2.5 GB in bfloat16 (16 layers, tied embeddings), a base and four fine-tuned (structured.py): 12.5 GB on
disk beside an output of 2.5 GB, written tensor by tensor and deleted afterwards unless --keep. Each merge is a run of
the command line with start-up and the output put on disk, from the page cache where that holds the inputs. Reported:
wall and CPU seconds, peak RSS, GFLOP of the weight matrices (spectral_flops.py) and its share of measured sgemm over
the CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from side_by_side import tools
from side_by_side.checkpoints import Entry, tensors
from spectral_flops import spectral_flops

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
RESULTS = HERE / "results" / "llama_merge.json"
TASKS = 4
WANTED_RSS = 3e9
MERGES: dict[str, dict[str, Any]] = {
    "ace": {"merge_method": "ace"},
    "tsv_m + svc": {"merge_method": "tsv_m", "calibrate": [{"method": "svc"}]},
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=CONFIG["vocab_size"])
    parser.add_argument("--merges", default=",".join(MERGES), help=f"of {', '.join(MERGES)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--memory", default="2.8GB", help="pymerge's --memory: what it may take beside the program itself"
    )
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "llama_merge", help="checkpoints, outputs")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints for a later run")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.merges = args.merges.split(",")
    if unknown := [name for name in args.merges if name not in MERGES]:
        parser.error(f"unknown: {', '.join(unknown)}; merges: {', '.join(MERGES)}")
    return args


def make_checkpoints(root: Path, config: dict[str, Any]) -> None:
    """In a process of its own: what this one holds would be the floor of every merge's peak RSS."""
    script = (
        "import json, sys; from pathlib import Path; from side_by_side.checkpoints import tensors\n"
        "from structured import write_models; config = json.loads(sys.argv[2])\n"
        f"write_models(Path(sys.argv[1]), list(tensors(config)), {TASKS}, 'BF16', config)"
    )
    subprocess.run([sys.executable, "-c", script, str(root), json.dumps(config)], check=True, cwd=HERE)


def sgemm_gflops() -> float:
    """Of one core, measured in a process of its own."""
    script = "import torch, method_worker; torch.set_num_threads(1); print(method_worker.peaks()['sgemm_gflops'])"
    run = subprocess.run([sys.executable, "-c", script], check=True, cwd=HERE, capture_output=True, text=True)
    return float(run.stdout)


def write_recipe(root: Path, name: str) -> Path:
    """JSON is YAML."""
    models = [{"model": str(root / f"t{task}")} for task in range(1, TASKS + 1)]
    path = root / f"{name.replace(' ', '')}.yaml"
    path.write_text(json.dumps(MERGES[name] | {"base_model": str(root / "base"), "models": models}, indent=2) + "\n")
    return path


def gflop(name: str, shapes: list[tuple[int, ...]]) -> float:
    """Of the weight matrices; the embeddings are averaged."""
    counts = [spectral_flops(method, shapes, TASKS) for method in name.split(" + ")]
    return sum(count for count in counts if count) / 1e9


def measure(name: str, root: Path, args: argparse.Namespace, shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """Costs of one merge, or {"failed": why}."""
    out = root / "out"
    command = tools.pymerge_command(write_recipe(root, name), out, args.threads)
    tools.warm([root / "base", *(root / f"t{task}" for task in range(1, TASKS + 1))])
    try:
        cost = tools.run([*command, "--memory", args.memory], out, args.threads)
    except RuntimeError as failure:
        return {"failed": str(failure)}
    written = tools.weight_bytes(out)
    shutil.rmtree(out)
    return {"wall": cost.wall, "cpu": cost.cpu, "rss": cost.rss, "written": written, "gflop": gflop(name, shapes)}


def show(name: str, result: dict[str, Any], sgemm: float) -> None:
    if "failed" in result:
        print(f"{name:12s} {result['failed']}", flush=True)
        return
    result["of_sgemm"] = result["gflop"] / result["cpu"] / sgemm
    memory = f"{result['rss'] / 1e9:5.2f} GB peak RSS" + (" (wanted: 3)" if result["rss"] > WANTED_RSS else "")
    share = f"{result['gflop']:8.0f} GFLOP {result['of_sgemm']:5.2f} of sgemm"
    print(f"{name:12s} {result['wall']:8.1f} s {result['cpu']:8.1f} CPU s  {memory}  {share}", flush=True)


def main() -> int:
    args = arguments()
    config = CONFIG | {"num_hidden_layers": args.layers, "vocab_size": args.vocabulary}
    entries: list[Entry] = list(tensors(config))
    size = 2 * sum(math.prod(shape) for _, shape in entries)
    root = args.work.resolve()
    root.mkdir(parents=True, exist_ok=True)
    needed, free = size * (TASKS + 2.5), shutil.disk_usage(root).free
    if free < needed:
        print(f"{root}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free", file=sys.stderr)
        return 1
    models = root / f"{args.layers}x{args.vocabulary}"
    make_checkpoints(models, config)
    report: dict[str, Any] = {"layers": args.layers, "checkpoint_bytes": size, "threads": args.threads}
    report |= {"memory": args.memory, **tools.provenance(REPOSITORY), "sgemm_gflops": sgemm_gflops(), "merges": {}}
    sgemm = report["sgemm_gflops"]
    print(f"{args.layers} layers, {size / 1e9:.2f} GB each, T = {TASKS}; sgemm {sgemm:.0f} GFLOP/s", flush=True)
    shapes = [shape for name, shape in entries if ".layers." in name]
    for name in args.merges:
        report["merges"][name] = measure(name, models, args, shapes)
        show(name, report["merges"][name], sgemm)
    if not args.keep:
        shutil.rmtree(models)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(result.get("rss", math.inf) <= WANTED_RSS for result in report["merges"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
