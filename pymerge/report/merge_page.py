"""The page of a merged model, from its merge.json: recipe, times, memory, relaxations, diagnostics, checksums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pymerge.checkpoint import safe_name
from pymerge.checkpoint.index import read_json_object
from pymerge.checkpoint.place import check_output_file
from pymerge.engine.verify import MAX_SUMMARY
from pymerge.errors import InputError
from pymerge.report.diagnostics import diagnostics, shown
from pymerge.report.figures import Chart, Section, Table, write_figures
from pymerge.report.page import write_page

Summary = Mapping[str, Any]
FIRST = ("base_model", "merge_method", "models", "parameters")  # keys of a recipe; the others follow


def report(
    folder: str | Path, out: str | Path = "report.html", *, png: str | Path | None = None, svg: str | Path | None = None
) -> list[Path]:
    """Writes a page about a merged model, and its charts as pictures. Reads merge.json alone: no weights, no inputs.

    folder    what `merge` wrote, models and adapters
    png, svg  folders for the pictures
    Returns   the files written
    Raises    InputError: no merge.json of pymerge, or plotly (for pictures matplotlib) is missing; OutputError,
              also where the page would replace a file of the model."""
    folder = Path(folder)
    check_output_file(out, [folder])
    title, subtitle, sections = merge_sections(folder)
    write_page(out, title, subtitle, sections)
    written = [Path(out)]
    if png is not None:
        written += write_figures(png, sections, "png")
    if svg is not None:
        written += write_figures(svg, sections, "svg")
    return written


def merge_sections(folder: Path) -> tuple[str, str, list[Section]]:
    """Title, subtitle and sections of the page."""
    path = folder / "merge.json"
    if not path.is_file() and (folder / "sweep.json").is_file():
        raise InputError(f"{folder}: a sweep: report one of its folders")
    if not path.is_file():
        raise InputError(f"{folder}: no merge.json here: a report is made of a folder that pymerge wrote")
    summary = read_json_object(path, MAX_SUMMARY)
    try:
        method = " + ".join(steps_of(summary["recipe"]))
        subtitle = f"{method}, by pymerge {summary['pymerge']}" + (
            f", {_day(summary['date'])}" if "date" in summary else ""
        )
        return f"Merge report: {folder.resolve().name}", subtitle, list(_sections(summary))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: not as pymerge {summary.get('pymerge', '')} writes it ({found})") from error


def steps_of(recipe: Mapping[str, Any]) -> list[str]:
    """Names of the methods, in the order of their steps."""

    def named(step: Any) -> list[str]:
        if isinstance(step, list):
            return [name for one in step for name in named(one)]
        return [step["method"] if isinstance(step, Mapping) else str(step)] if step else []

    aligned = ["align"] if recipe.get("align") else []
    return [*aligned, *named(recipe.get("purify")), recipe["merge_method"], *named(recipe.get("calibrate"))]


def _sections(summary: Summary) -> Iterator[Section]:
    yield _overview(summary)
    yield _recipe(summary)
    yield _care(summary)
    if summary.get("align"):
        yield _alignment(summary["align"])
    if summary.get("vocabulary"):
        rows = [(key, _words(value)) for key, value in summary["vocabulary"].items()]
        yield Section("Vocabulary", tables=[Table("Tokens and their rows", ("what", "value"), rows)], collapsed=True)
    yield from diagnostics(summary["per_tensor"], model_labels(summary["recipe"]))
    if sums := summary.get("checksums"):
        rows = [(safe_name(name), crc) for name, crc in sums.items()]
        rows += [(safe_name(name), crc) for name, crc in summary.get("side_checksums", {}).items()]
        yield Section(
            "Checksums",
            ["CRC-32C of every tensor as it was written; `pymerge verify` reads them again."],
            tables=[Table("Tensors", ("tensor", "CRC-32C"), rows)],
            collapsed=True,
        )


def _overview(summary: Summary) -> Section:
    """What was made, in what time and memory."""
    rows: list[tuple[str, str | float | int | None]] = []
    for kind, count in summary.get("tensors", {}).items():
        rows.append((f"tensors {kind}", count))
    for key, label in (("matrices", "matrices in the adapter"), ("r", "rank"), ("error", "relative error")):
        if key in summary:
            rows.append((label, summary[key]))
    for key, label in (("bytes_read", "read"), ("bytes_written", "written"), ("peak_rss_bytes", "peak memory")):
        if key in summary:
            rows.append((label, _size(summary[key])))
    if "seconds" in summary:
        rows.append(("time", f"{summary['seconds']:.1f} s"))
        rows.append(("rate", f"{_size(summary['bytes_read'] / max(summary['seconds'], 1e-3))} read a second"))
    machine = summary.get("machine", {})
    rows += [(key, machine[key]) for key in ("processor", "cpu_level") if key in machine]
    charts, text = [], []
    if found := summary.get("busy_seconds"):
        busy = {stage: found[stage] for stage in ("read", "compute", "write")}
        parts = ", ".join(f"{stage} {spent:.2f} s" for stage, spent in busy.items())
        text = [
            "Reading, computing and writing go on at the same time, computing on several threads: the seconds of all "
            "threads, which may add up to more than the time of the merge."
        ]
        charts = [
            Chart("bar", "Busy seconds", list(busy), {"seconds": list(busy.values())}, "stage", "seconds", f"{parts}.")
        ]
    return Section("Overview", text, charts, [Table("The merge", ("what", "value"), rows)])


def _recipe(summary: Summary) -> Section:
    import yaml

    def text(recipe: Mapping[str, Any]) -> str:
        ordered = {key: recipe[key] for key in sorted(recipe, key=lambda key: (key not in FIRST, key))}
        return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=100)

    rows = [
        (_words(given.get("path")), safe_name(name), _size(size))
        for given in summary["inputs"]
        for name, size, *_ in given.get("files", ())
    ]
    texts = [text(summary["recipe"])]
    if resolved := summary.get("resolved"):
        texts += ["What references in it stood for:", text(resolved)]
    if packages := summary.get("methods_from"):
        texts.append("Methods of other packages: " + ", ".join(f"{name}: {found}" for name, found in packages.items()))
    return Section("Recipe", texts, tables=[Table("Inputs", ("model", "file", "size"), rows)])


def _care(summary: Summary) -> Section:
    """Checks that were relaxed, and notes."""
    relaxed = summary.get("relaxations") or {}
    texts = [] if relaxed else ["No check was relaxed."]
    tables = [Table("Relaxed checks", ("check", "how"), [(key, _words(how)) for key, how in relaxed.items()])]
    left = [(safe_name(name), share) for name, share in summary.get("left_out", {}).items()]
    lost = [Table("Changes that the adapter cannot hold", ("tensor", "change over weight"), left)] if left else []
    return Section("Relaxed checks and notes", [*texts, *summary["notes"]], tables=(tables if relaxed else []) + lost)


def _alignment(found: Mapping[str, Any]) -> Section:
    """How much more alike the units are in the order that was found; a zip has no similarity before."""
    groups, charts = found.get("groups") or {}, []
    alike = {when: [_mean(group.get(when)) for group in groups.values()] for when in ("before", "after")}
    rows = [
        (safe_name(name), group.get("units"), _words(group.get("moved")), before, after)
        for (name, group), before, after in zip(groups.items(), *alike.values(), strict=True)
    ]
    if rows:
        series = {when: values for when, values in alike.items() if when in found}
        means = " and ".join(f"{found[when]:.3g} {when}" for when in series)
        alt = f"Similarity of the units, {means}."
        x = [row[0] for row in rows]
        charts = [Chart("bar", "Similarity of the units", x, series, "group", "mean similarity", alt)]
    rest = [(key, _words(value)) for key, value in found.items() if key != "groups"]
    tables = [Table("Groups", ("group", "units", "moved", "before", "after"), rows)] if rows else []
    return Section("Alignment", charts=charts, tables=[*tables, Table("The search", ("what", "value"), rest)])


def model_labels(recipe: Mapping[str, Any]) -> list[str]:
    """The last parts of the models' paths, where these tell them apart."""
    paths = [str(model["model"] if isinstance(model, Mapping) else model) for model in recipe.get("models") or ()]
    short = [safe_name(path.rstrip("/").rpartition("/")[2] or path) for path in paths]
    return short if len(set(short)) == len(short) else [f"{n} {name}" for n, name in enumerate(short, start=1)]


def _day(date: str) -> str:
    """Without the seconds' zone, which is UTC."""
    return date.replace("T", " ").removesuffix("+00:00") + " UTC"


def _mean(values: Sequence[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def _words(value: Any) -> str | float | int | None:
    """A value of merge.json as a cell."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_words(one)}" for key, one in value.items())
    return shown(value)


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"
