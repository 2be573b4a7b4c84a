"""The tables of the speed suite: speed.md whole, README.md's between its markers. From speed.json alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rows import Row, Runs

Report = dict[str, dict[str, Any]]  # peer -> its rows, and machine, commit, date ... beside them

QUIET = 0.05  # share of the processors' time that others may take
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
TITLES = {
    "mergekit": "Against mergekit 0.1.5, the same YAML, from disk to disk, start-up included",
    "fusion_bench": "Against FusionBench 0.2.33, the same tensors in memory",
    "sd_mecha": "Against sd-mecha, the same files, from disk to disk, start-up included",
    "peft": "Against PEFT's add_weighted_adapter, the same LoRA adapters",
    "pytorch": "Against plain PyTorch formulations of the papers' formulas, the same tensors in memory",
    "assignment": "Linear assignment against scipy, lap and lapx",
}
MANY = 3  # settings of one method, from which on README's table has one line for all


def seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def size(value: int | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def held(runs: Runs) -> int:
    """Growth above the inputs where these are in memory, else the whole process."""
    return runs.rss if runs.growth is None else runs.growth


def memory(runs: Runs) -> str:
    return size(held(runs))


def ratio(value: float) -> str:
    return f"{value:.2g} x" if value < 10 else f"{value:.0f} x"


def results(row: Row) -> str:
    """Whether, and by how much, the results differ."""
    if not row.agrees:
        return "DIFFER" if row.difference is None else f"DIFFER by {row.difference:.0e}"
    return "same distribution" if row.difference is None else f"{row.difference:.0e}" if row.difference else "0"


def remark(row: Row) -> str:
    """Every row in which pymerge is slower has a cause here, or says that there is none."""
    cause = row.cause or ("SLOWER, NOT EXPLAINED" if row.slower() else "")
    return "; ".join(text for text in (cause, row.note) if text)


def table(head: list[str], body: list[list[str]]) -> list[str]:
    """Columns without any content are left out."""
    kept = [i for i, name in enumerate(head) if any(line[i] for line in body)]
    lines = [[head[i] for i in kept], ["---"] * len(kept), *([line[i] for i in kept] for line in body)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def usual(rows: list[Row]) -> str:
    """The setting that most of them have."""
    settings = [row.setting for row in rows]
    return max(settings, key=settings.count)


def short(part: dict[str, Any]) -> list[str]:
    """README's table of one peer: the strongest opponent alone; one line for a method in many settings."""
    rows = part["rows"]
    names = {row.strongest()[0] for row in rows}
    one = names.pop() if len(names) == 1 else ""
    setting = usual(rows)
    memory_head = "peak memory" if rows[0].pymerge.growth is None else "memory growth"
    head = [
        "method",
        "pymerge",
        one or "strongest opponent",
        "ratio",
        memory_head,
        "opponent's",
        "results differ by",
        "",
    ]
    body = []
    for method in dict.fromkeys(row.method for row in rows):
        group = [row for row in rows if row.method == method]
        body += [joined(group, one)] if len(group) >= MANY else [single(row, one, setting) for row in group]
    measure = "CPU seconds" if rows[0].measure == "cpu" else "wall time"
    return [f"{TITLES[rows[0].peer]} ({setting}; {measure}):", "", *table(head, body), "", f"{provenance(part)}", ""]


def single(row: Row, one: str, setting: str) -> list[str]:
    """Of one row; what its setting has beyond `setting` stands beside the method."""
    name, runs = row.strongest()
    other = ", ".join(text for text in row.setting.split(", ") if text not in setting.split(", "))
    cells = [row.method + (f" ({other})" if other else ""), seconds(row.seconds(row.pymerge))]
    cells += [seconds(row.seconds(runs)) + ("" if one else f", {name}"), ratio(row.ratio())]
    return [*cells, memory(row.pymerge), memory(runs), results(row), remark(row)]


def joined(rows: list[Row], one: str) -> list[str]:
    """Of one method in several settings: from the least to the most of each figure."""
    strongest = [row.strongest() for row in rows]
    names = "" if one else ", " + " or ".join(dict.fromkeys(name for name, _ in strongest))
    ours = extent([row.seconds(row.pymerge) for row in rows], seconds)
    theirs = extent([row.seconds(runs) for row, (_, runs) in zip(rows, strongest, strict=True)], seconds)
    cells = [f"{rows[0].method} ({len(rows)} settings)", ours, theirs + names]
    cells += [extent([row.ratio() for row in rows], ratio)]
    cells += [extent([held(row.pymerge) for row in rows], size), extent([held(runs) for _, runs in strongest], size)]
    worst = max(rows, key=lambda row: (not row.agrees, row.difference or 0.0))
    return [*cells, results(worst), "; ".join(dict.fromkeys(remark(row) for row in rows if remark(row)))]


def extent(values: list, text: Callable[[Any], str]) -> str:
    least, most = text(min(values)), text(max(values))
    return least if least == most else f"{least} to {most}"


def full(part: dict[str, Any]) -> list[str]:
    """speed.md's table of one peer: every opponent and floor a line."""
    rows = part["rows"]
    head = ["method", "setting", "program", "wall", "CPU", "pymerge is", "peak memory", "above inputs"]
    head += ["read", "written", "results differ by", "compared", "cause, note"]
    body = []
    for row in rows:
        programs = {"pymerge": row.pymerge} | row.opponents | row.floors
        for name, runs in programs.items():
            first = name == "pymerge"
            times = row.seconds(runs) / row.seconds(row.pymerge)
            faster = "" if first else f"{times:.2f} x" if name in row.opponents else f"{1 / times:.2f} x the floor"
            cells = [row.method if first else "", row.setting if first else "", name]
            cells += [span(runs.wall), span(runs.cpu), faster, size(runs.rss), size(runs.growth)]
            cells += [size(runs.read), size(runs.written)]
            body.append([*cells, *([results(row), row.compared, remark(row)] if first else [""] * 3)])
    return [f"## {TITLES[rows[0].peer]}", "", provenance(part), "", *table(head, body), ""]


def span(values: list[float]) -> str:
    text = seconds(statistics.median(values))
    return f"{text} ({seconds(min(values))} to {seconds(max(values))})" if len(values) > 1 else text


def provenance(part: dict[str, Any]) -> str:
    """Where and when, and whether the machine was quiet."""
    share = part["others"]
    beside = "no other work" if share < QUIET else f"beside other work that took {100 * share:.0f} % of the processors"
    quick = "tiny sizes, one repetition: NO MEASUREMENT. " if part["quick"] else ""
    versions = f"torch {part['torch']}, Python {part['python']}"
    return f"{quick}{part['processor']}, {versions}, commit {part['commit']}, {part['date']}, {beside}."


def markdown(report: Report) -> str:
    lines = [
        "# pymerge and its peers, side by side",
        "",
        "Made by `make speed`. Programs took turns; times are medians (least to most). `pymerge is`: an opponent's",
        "time over pymerge's, in wall seconds where whole programs run, in CPU seconds in memory; beside floors",
        "pymerge's time over the floor's. Peak memory is that of the whole process. Bytes are those from and to",
        "storage, in a run that starts with inputs out of the page cache.",
        "",
    ]
    for part in report.values():
        lines += full(part)
    return "\n".join(lines).rstrip() + "\n"


def write_readme(path: Path, report: Report) -> None:
    """What is between the markers becomes the tables; ValueError where there are none."""
    before, rest = path.read_text().split(BEGIN)
    _, after = rest.split(END)
    block = "\n".join(line for part in report.values() for line in short(part)).rstrip()
    path.write_text(f"{before}{BEGIN}\n{block}\n{END}{after}")
