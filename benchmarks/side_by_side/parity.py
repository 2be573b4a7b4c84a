"""Does a mergekit YAML give the same model? Each YAML of parity/ runs, unchanged, through both programs.

    python benchmarks/side_by_side/parity.py                        makes .venv-mergekit where there is none
    python benchmarks/side_by_side/parity.py --mergekit-venv DIR

Tiny models in real layouts (parity_models.py); `pymerge merge` and mergekit 0.1.5's command line; tensors, config.json,
tokenizer files and index compared (parity_compare.py). Prints a table and writes it to benchmarks/results/parity.json
and .md. Exit status 1 where a row neither agrees nor is a stated exception: parity/exceptions.json says per YAML and
column why it differs. A stated exception that does not occur is an error too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tools
import yaml

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "parity.json"
COLUMNS = ("tensors", "layout", "config.json", "tokenizer", "index")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of YAMLs in parity/, without the ending; default: all")
    parser.add_argument("--mergekit-venv", type=Path, default=REPOSITORY / ".venv-mergekit")
    parser.add_argument("--work", type=Path, help="keep models and outputs in this new folder")
    parser.add_argument("--json", type=Path, help=f"where the results go; default, for all YAMLs: {RESULTS}")
    return parser.parse_args()


def recipes(names: list[str]) -> list[Path]:
    found = {path.stem: path for path in sorted((HERE / "parity").glob("*.yml"))}
    unknown = [name for name in names if name not in found]
    if unknown:
        sys.exit(f"no such YAML in parity/: {', '.join(unknown)}")
    return [found[name] for name in names or found]


def run(interpreter: Path, script: str, *rest: str | Path) -> None:
    """In a process of its own, offline; its output is shown only where it fails."""
    command = [str(interpreter), str(HERE / script), *map(str, rest)]
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = tools.environment(1) | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def judge(row: dict[str, Any], stated: dict[str, dict[str, str]]) -> str:
    """agrees, excepted or DIFFERS; adds the stated reasons of what differs, and what is stated but does not occur."""
    reasons = stated.get(row["name"], {})
    columns = {column: problem for column, problem in row["problems"].items() if problem}
    row["reasons"] = {column: reasons[column] for column in columns if column in reasons}
    idle = dict.fromkeys(reasons.keys() - columns.keys(), "a stated exception that does not occur")
    row["problems"] |= idle
    if idle or columns.keys() - reasons.keys():
        return "DIFFERS"
    return "excepted" if columns else "agrees"


def cell(row: dict[str, Any], column: str) -> str:
    if column not in row["problems"]:
        return ""
    if not row["problems"][column]:
        return "both refuse" if column == "tensors" and not row["tensors"] else "agrees"
    return "excepted" if column in row["reasons"] else "DIFFERS"


def table(report: dict[str, Any]) -> str:
    lines = [
        "| YAML | tensors | largest difference | at a cut | " + " | ".join(COLUMNS) + " | verdict |",
        "| --- " * (len(COLUMNS) + 5) + "|",
    ]
    for row in report["rows"]:
        difference = "random" if row["random"] else f"{row['difference']:.1e}"
        size = [str(row["tensors"]), difference, str(row["excepted"])] if row["tensors"] else [""] * 3
        cells = [row["name"], *size, *(cell(row, column) for column in COLUMNS), row["verdict"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def notes(report: dict[str, Any]) -> list[str]:
    """Differences in words, with the reason where one is stated."""
    lines = []
    for row in report["rows"]:
        for column, problem in row["problems"].items():
            if problem:
                reason = row["reasons"].get(column, "NOT EXPLAINED")
                lines.append(f"- {row['name']}, {column}: {problem}. {reason}")
    return lines


def write(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    text = [
        "# mergekit YAMLs through pymerge and mergekit 0.1.5",
        "",
        "Made by `python benchmarks/side_by_side/parity.py` from the YAMLs in benchmarks/side_by_side/parity/.",
        "Differences are relative to a tensor's largest entry; random: compared by share and norm of what changed.",
        "`at a cut`: entries that a selection through equal magnitudes leaves to the order of a sort.",
        "",
        table(report),
        "",
        *notes(report),
    ]
    path.with_suffix(".md").write_text("\n".join(text).rstrip() + "\n")


def main() -> int:
    args = arguments()
    tools.make_mergekit(args.mergekit_venv)
    from parity_compare import compare

    theirs = args.mergekit_venv.absolute() / "bin" / "python"
    stated = json.loads((HERE / "parity" / "exceptions.json").read_text())
    chosen = recipes(args.names)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary) / "work").resolve()
        models = work / "models"
        models.mkdir(parents=True, exist_ok=True)
        run(theirs, "parity_models.py", models)
        run(theirs, "parity_worker.py", "mergekit", models, work / "mergekit", *chosen)
        run(Path(sys.executable), "parity_worker.py", "pymerge", models, work / "pymerge", *chosen)
        for path in chosen:
            recipe = yaml.safe_load(path.read_text())
            outputs = (work / program / path.stem for program in ("pymerge", "mergekit"))
            row = asdict(compare(recipe, path.stem, models, *outputs))
            rows.append(row | {"verdict": judge(row, stated)})
    report = {"rows": rows, "mergekit": tools.MERGEKIT, **tools.provenance(REPOSITORY)}
    print(table(report), *notes(report), sep="\n")
    failed = [row["name"] for row in rows if row["verdict"] == "DIFFERS"]
    print(f"{len(rows) - len(failed)} of {len(rows)} agree or differ as stated")
    if args.json or not args.names:
        write(report, args.json or RESULTS)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
