"""What observing a Llama-3.2-1B-shaped model costs, streamed and in memory, and whether both find the same.

    python benchmarks/bench_observe.py [--layers 16] [--samples 32] [--length 128] [--threads 1] [--runs streamed]

A checkpoint of 2.5 GB in bfloat16 with random weights (llama_merge.py's shape) and a word-level tokenizer; each run is
`pymerge observe` on samples of random words, in a process of its own: wall and CPU seconds, peak RSS. The run in memory
takes all samples as one batch, as the streamed one does, so that products of bfloat16 are rounded alike. Difference:
the largest over all inputs of ||A - B|| / ||B||, Frobenius, of the stored triangles.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from llama_merge import CONFIG
from side_by_side import tools

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
RESULTS = HERE / "results" / "observe.json"
WANTED_RSS, WANTED_DIFFERENCE = 2e9, 1e-5
WORDS = 1000
RUNS = {"streamed": ["--stream"], "streamed, float64": ["--stream", "--float64"], "in memory": []}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", default=";".join(RUNS), help="of these; figures of the others stay in the report")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "bench_observe")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint for a later run")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.runs = args.runs.split(";")
    if unknown := [name for name in args.runs if name not in RUNS]:
        parser.error(f"unknown: {', '.join(unknown)}; runs: {'; '.join(RUNS)}")
    return args


def make_model(folder: Path, config: dict[str, Any]) -> None:
    """In a process of its own: what this one holds would be the floor of every run's peak RSS."""
    script = (
        "import json, sys; from pathlib import Path; from side_by_side.checkpoints import tensors\n"
        "from structured import write_models; config = json.loads(sys.argv[2])\n"
        "write_models(Path(sys.argv[1]), list(tensors(config)), 0, 'BF16', config)\n"
        "from tokenizers import Tokenizer, models, pre_tokenizers; from transformers import PreTrainedTokenizerFast\n"
        f"words = {{'<pad>': 0}} | {{f'w{{i}}': i for i in range(1, {WORDS})}}\n"
        "tokenizer = Tokenizer(models.WordLevel(words, unk_token='<pad>'))\n"
        "tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()\n"
        "made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token='<pad>')\n"
        "made.save_pretrained(Path(sys.argv[1]) / 'base')"
    )
    subprocess.run([sys.executable, "-c", script, str(folder), json.dumps(config)], check=True, cwd=HERE)


def write_samples(path: Path, samples: int, length: int) -> None:
    words = random.Random(0)
    texts = [" ".join(f"w{words.randrange(1, WORDS)}" for _ in range(length)) for _ in range(samples)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def difference(one: Path, other: Path) -> float:
    """In a process of its own, for the same reason as `make_model`."""
    script = (
        "import sys, pymerge\n"
        "a, b = (pymerge.open_statistics(path) for path in sys.argv[1:])\n"
        "assert a.header.modules == b.header.modules and a.rows == b.rows and a.rows\n"
        "worst = 0.0\n"
        "for holder in a.rows:\n"
        "    x, y = a[holder], b[holder]\n"
        "    x, y = (m.triangle if m.triangle is not None else m.samples for m in (x, y))\n"
        "    worst = max(worst, float((x.double() - y.double()).norm() / y.double().norm()))\n"
        "print(worst)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(one), str(other)], check=True, capture_output=True, text=True
    )
    return float(run.stdout)


def measure(model: Path, data: Path, out: Path, options: list[str], args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "pymerge", "observe", str(model), "--data", str(data), "-o", str(out)]
    command += ["--samples", str(args.samples), "--length", str(args.length), "--batch-size", str(args.samples)]
    out.unlink(missing_ok=True)
    tools.warm([model])
    cost = tools.run([*command, *options], out.with_suffix(".run"), args.threads)
    return {"wall": cost.wall, "cpu": cost.cpu, "rss": cost.rss, "written": out.stat().st_size}


def main() -> int:
    args = arguments()
    root = args.work.resolve() / str(args.layers)
    config = CONFIG | {"num_hidden_layers": args.layers}
    make_model(root, config)
    write_samples(root / "samples.jsonl", args.samples, args.length)
    report: dict[str, Any] = {name: getattr(args, name) for name in ("layers", "samples", "length", "threads")}
    known = json.loads(args.json.read_text()) if args.json.exists() else {}
    report["runs"] = known["runs"] if known == report | {"runs": known.get("runs")} else {}
    files = {name: root / f"{name.replace(', ', '-').replace(' ', '-')}.safetensors" for name in RUNS}
    for name in args.runs:
        found = measure(root / "base", root / "samples.jsonl", files[name], RUNS[name], args)
        report["runs"][name] = found | tools.provenance(REPOSITORY)
        print(f"{name:18s} {found['wall']:7.1f} s {found['cpu']:7.1f} CPU s {found['rss'] / 1e9:6.2f} GB", flush=True)
        if name != "streamed" and files["streamed"].exists():
            wrong = report["runs"][name]["difference"] = difference(files["streamed"], files[name])
            print(f"{'':18s} streamed differs by {wrong:.1e}", flush=True)
    if not args.keep:
        shutil.rmtree(root)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=2) + "\n")
    worst = report["runs"].get("in memory", {}).get("difference", 0.0)
    peak = report["runs"].get("streamed", {}).get("rss", 0)
    return 0 if peak <= WANTED_RSS and worst <= WANTED_DIFFERENCE else 1


if __name__ == "__main__":
    sys.exit(main())
