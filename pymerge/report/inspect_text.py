"""An inspection in a terminal: a line a model, a line a pair, and what it suggests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pymerge.checkpoint import safe_name
from pymerge.report import measures
from pymerge.report.inspect_page import short_names

if TYPE_CHECKING:
    from rich.table import Table

    from pymerge.report.inspection import Inspection

PAIRS_SHOWN = 10  # more are a table of their own on the page


def show(found: Inspection) -> None:
    """Prints it to standard output."""
    from rich.markup import escape

    from pymerge.engine.console import standard_output

    console = standard_output()
    labels = [escape(safe_name(name, 40)) for name in short_names(found.models)]
    entries = found.whole.moments.entries
    console.print(
        f"{len(found.tensors)} tensors, {entries / 1e6:.1f} million entries; {found.bytes_read / 1e9:.2f} GB read in "
        f"{found.seconds:.1f} s"
    )
    console.print(models_table(found, labels))
    if len(labels) > 1:
        console.print(pairs_table(found, labels))
    if found.left_out:
        listed = [f"{safe_name(name)} ({why})" for name, why in list(found.left_out.items())[:5]]
        more = f", ... ({len(found.left_out)} in all)" if len(found.left_out) > len(listed) else ""
        console.print(f"not compared: {escape(', '.join(listed))}{more}")
    for note in found.notes:
        console.print(f"note: {escape(note)}")
    for suggestion in found.suggestions:
        console.print(f"[bold]{suggestion.rule}[/bold]: {escape(suggestion.text)} [dim]({suggestion.source})[/dim]")


def models_table(found: Inspection, labels: Sequence[str]) -> Table:
    m, spectra = found.whole.moments, found.whole.spectra
    table = table_of("model", "update / weight", "entries changed", "untouched")
    for column in ("effective rank", "stable rank", "directions proven") if spectra else ():
        table.add_column(column, justify="right")
    sizes, changed = measures.relative_norms(m), measures.changed(m)
    for t, label in enumerate(labels):
        row = [label, shown(sizes[t]), f"{changed[t]:.1%}", f"{len(found.untouched(t))}"]
        if spectra:
            row += [shown(f(spectra, t)) for f in (measures.effective_rank, measures.stable_rank, measures.certified)]
        table.add_row(*row)
    return table


def pairs_table(found: Inspection, labels: Sequence[str]) -> Table:
    m, spectra = found.whole.moments, found.whole.spectra
    table = table_of("pair", "cosine", "opposed signs", *(("shared directions", "by chance") if spectra else ()))
    pairs = measures.pairs(len(labels))
    for pair in pairs[:PAIRS_SHOWN]:
        row = [
            f"{labels[pair[0]]} / {labels[pair[1]]}",
            shown(measures.cosine(m, pair)),
            shown(measures.opposed(m, pair)),
        ]
        row += [shown(f(spectra, pair)) for f in (measures.overlap, measures.overlap_by_chance)] if spectra else []
        table.add_row(*row)
    if len(pairs) > PAIRS_SHOWN:
        table.add_row(f"... {len(pairs) - PAIRS_SHOWN} more")
    return table


def table_of(first: str, *others: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first)
    for column in others:
        table.add_column(column, justify="right")
    return table


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
