"""An inspection as sections of a page: what it suggests, models, depth, kinds of layers, magnitudes, spectra, tensors.

Everything but the last table is summed over tensors, so the page of a large model is as small as that of a small one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pymerge.engine.moments import OCTAVES, Moments
from pymerge.report import measures
from pymerge.report.figures import Chart, Section, Table
from pymerge.report.spectra import HELD

if TYPE_CHECKING:
    from pymerge.report.inspection import Group, Inspection

TENSORS_SHOWN = 2000  # rows of the last table: those with the largest updates
NAMES_SHOWN = 200
Places = tuple[str, Sequence[str | float], list["Group"]]  # of an axis: its label, its places, what is there


def sections(found: Inspection) -> list[Section]:
    """The page, from the top."""
    labels = short_names(found.models)
    kinds: Places = ("kind of tensor", list(found.kinds), list(found.kinds.values()))
    parts = [suggested(found), of_models(found, labels)]
    if len(labels) > 1:
        parts.append(between_models(found, labels))
    parts += [over_depth(found, labels, *depth) for depth in depths(found)]
    parts += [over_kinds(found, labels, kinds), magnitudes(found, labels)]
    if found.whole.spectra:
        parts.append(spectra(found, labels, kinds))
    return [*parts, of_tensors(found, labels), left_out(found, labels)]


def subtitle(found: Inspection) -> str:
    return (
        f"{', '.join(short_names(found.models))} against {found.base}: {len(found.tensors)} tensors, "
        f"{found.whole.moments.entries / 1e6:.1f} million entries"
    )


def short_names(models: Sequence[str]) -> list[str]:
    """The last parts of the models' paths; whole paths where these are not distinct."""
    last = [model.rstrip("/").rsplit("/", 1)[-1] or model for model in models]
    if len(set(last)) == len(last):
        return last
    return list(models) if len(set(models)) == len(models) else [f"{n}: {m}" for n, m in enumerate(models, start=1)]


def depths(found: Inspection) -> list[tuple[str, Places]]:
    """Each stack of layers, with its layers as an axis."""
    stacks: dict[str, list[tuple[int, Group]]] = {}
    for (stack, number), group in found.layers.items():
        stacks.setdefault(stack, []).append((number, group))
    return [
        (stack, ("layer", [float(number) for number, _ in layers], [group for _, group in layers]))
        for stack, layers in stacks.items()
    ]


def per_model(labels: Sequence[str], values: Sequence[Sequence[float | None]]) -> dict[str, list[float | None]]:
    """A series a model, from a list of models at each place."""
    return {label: [row[t] for row in values] for t, label in enumerate(labels)}


def moment_chart(title: str, kind: str, at: Places, series: dict, y_label: str, said: str) -> Chart:
    label, places, _ = at
    return Chart(
        kind="line" if kind == "line" and len(places) > 1 else "bar",
        title=title,
        x=places,
        series=series,
        x_label=label,
        y_label=y_label,
        alt=f"{title}: {y_label} by {label}, {said}.",
    )


def extremes(series: dict[str, list[float | None]], places: Sequence[str | float]) -> str:
    """Where the largest value of all series is, in words."""
    known = [(v, label, x) for label, row in series.items() for v, x in zip(row, places, strict=True) if v is not None]
    if not known:
        return "nothing to show"
    value, label, place = max(known, key=lambda item: item[0])
    return f"largest for {label} at {place if isinstance(place, str) else f'{place:g}'}"


def charts_of(at: Places, labels: Sequence[str], kind: str, where: str) -> list[Chart]:
    """Relative norm of each model; cosine and opposed signs of each pair; what of the magnitude cancels."""
    _, places, groups = at
    moments = [group.moments for group in groups]
    sizes = per_model(labels, [measures.relative_norms(m) for m in moments])
    title = f"Size of the update {where}"
    charts = [moment_chart(title, kind, at, sizes, "norm of update / norm of weight", extremes(sizes, places))]
    if len(labels) > 1:
        pairs = {f"{labels[s]} / {labels[t]}": (s, t) for s, t in measures.pairs(len(labels))}
        for name, y_label, of in (
            ("Cosine between updates", "cosine", measures.cosine),
            ("Opposed signs", "share of entries both change", measures.opposed),
        ):
            series = pair_series(pairs, moments, of)
            charts.append(moment_chart(f"{name} {where}", kind, at, series, y_label, extremes(series, places)))
        lost: dict[str, list[float | None]] = {"all models": [measures.cancelled(m) for m in moments]}
        title = f"Magnitude lost in the sum {where}"
        charts.append(moment_chart(title, kind, at, lost, "share that opposite signs cancel", extremes(lost, places)))
    return charts


def pair_series(
    pairs: dict[str, measures.Pair], moments: Sequence[Moments], of: Callable[[Moments, measures.Pair], float | None]
) -> dict[str, list[float | None]]:
    """A series a pair; of many models their mean, least and largest."""
    rows = {name: [of(m, pair) for m in moments] for name, pair in pairs.items()}
    if len(rows) <= 6:
        return rows
    columns = [[value for value in column if value is not None] for column in zip(*rows.values(), strict=True)]
    return {
        "least": [min(column, default=None) for column in columns],
        "mean": [measures.average(column) for column in columns],
        "largest": [max(column, default=None) for column in columns],
    }


def suggested(found: Inspection) -> Section:
    rows = [(s.text, s.rule, s.value, s.threshold, s.reason, s.source) for s in found.suggestions]
    columns = ("suggestion", "rule", "value", "threshold", "reason", "source")
    text = (
        "Each line is what one rule says of the numbers below; thresholds are rules of thumb, the sources give reasons."
        if rows
        else "No rule found anything to say."
    )
    return Section("What this suggests", (text,), tables=(Table("Suggestions", columns, rows),) if rows else ())


def of_models(found: Inspection, labels: Sequence[str]) -> Section:
    m, spectra = found.whole.moments, found.whole.spectra
    columns = ["model", "update / weight", "entries changed", "median change below", "99 % below", "tensors untouched"]
    columns += ["effective rank", "stable rank", "directions proven"] if spectra else []
    sizes, changed, rows = measures.relative_norms(m), measures.changed(m), []
    for t, label in enumerate(labels):
        below = [measures.magnitude_below(m, t, share) for share in (0.5, 0.99)]
        row = [label, sizes[t], changed[t], *below, len(found.untouched(t))]
        if spectra:
            row += [f(spectra, t) for f in (measures.effective_rank, measures.stable_rank, measures.certified)]
        rows.append(row)
    text = ["Changes are of the entries that a model changes, in powers of two."]
    if spectra:
        text.append("Ranks are means over matrices; how many directions are proven is a median.")
    return Section("Models", text, tables=(Table("Models", columns, rows),))


def between_models(found: Inspection, labels: Sequence[str]) -> Section:
    group = found.whole
    m, lost = group.moments, measures.cancelled(group.moments)
    charts = [
        pair_map("Cosine between updates", labels, lambda pair: measures.cosine(m, pair)),
        pair_map("Entries changed in opposite directions", labels, lambda pair: measures.opposed(m, pair)),
    ]
    text = ["Of entries that two models change, half are changed in opposite directions by chance."]
    if lost is not None:
        text.append(f"The sum of all updates loses {lost:.1%} of their magnitude to opposite signs.")
    if group.spectra:
        charts.append(
            pair_map("Overlap of leading subspaces", labels, lambda pair: measures.overlap(group.spectra, pair))
        )
        text.append(
            "Overlap is the mean squared cosine of the principal angles between the directions that are proven for "
            "both models, of outputs and inputs, over all matrices: 1 is the same space."
        )
    return Section("Between models", text, charts)


def pair_map(title: str, labels: Sequence[str], of: Callable[[measures.Pair], float | None]) -> Chart:
    """A square of models, its diagonal empty."""
    known = [v for pair in measures.pairs(len(labels)) if (v := of(pair)) is not None]
    said = f"from {min(known):.3g} to {max(known):.3g}" if known else "nothing to show"
    rows = dict(zip(labels, measures.square(len(labels), of), strict=True))
    alt = f"{title} for each pair of models, {said}."
    return Chart(kind="heatmap", title=title, x=list(labels), series=rows, x_label="", y_label="", alt=alt)


def over_depth(found: Inspection, labels: Sequence[str], stack: str, at: Places) -> Section:
    charts = charts_of(at, labels, "line", f"over {stack}")
    if any(group.spectra for group in at[2]):
        ranks = per_model(labels, [[measures.effective_rank(g.spectra, t) for t in range(len(labels))] for g in at[2]])
        title = f"Effective rank over {stack}"
        charts.append(moment_chart(title, "line", at, ranks, "effective rank, mean", extremes(ranks, at[1])))
    kinds = kinds_over_depth(found, stack, at)
    return Section(f"Over depth: {stack}", (), [*charts, *kinds])


def kinds_over_depth(found: Inspection, stack: str, at: Places) -> list[Chart]:
    """Mean relative norm of all models, by kind and layer."""
    cells: dict[str, dict[float, float | None]] = {}
    for tensor in found.tensors:
        if tensor.layer is not None and tensor.layer[0] == stack:
            row = cells.setdefault(tensor.kind.removeprefix(f"{stack}.*."), {})
            row[float(tensor.layer[1])] = measures.average(measures.relative_norms(tensor.moments))
    if len(at[1]) < 2 or not 1 < len(cells) <= NAMES_SHOWN:
        return []
    series = {kind: [row.get(float(place)) for place in at[1]] for kind, row in cells.items()}
    title = f"Size of the update by kind and layer of {stack}"
    alt = f"{title}, mean of all models: {extremes(series, at[1])}."
    return [Chart("heatmap", title, [f"{place:g}" for place in at[1]], series, "layer", "", alt)]


def over_kinds(found: Inspection, labels: Sequence[str], kinds: Places) -> Section:
    _, names, groups = kinds
    columns = ["kind", "tensors", "entries", *(f"{label}: update / weight" for label in labels)]
    columns += ["conflicting entries", "magnitude lost in the sum"] if len(labels) > 1 else []
    rows = []
    for name, group in zip(names, groups, strict=True):
        m = group.moments
        row = [name, group.tensors, m.entries, *measures.relative_norms(m)]
        rows.append(row + ([measures.conflicted(m), measures.cancelled(m)] if len(labels) > 1 else []))
    shown: Places = (kinds[0], names[:NAMES_SHOWN], groups[:NAMES_SHOWN])
    charts = charts_of(shown, labels, "bar", "by kind")
    return Section("Kinds of tensors", (), charts, (Table("Kinds of tensors", columns, rows),))


def magnitudes(found: Inspection, labels: Sequence[str]) -> Section:
    m = found.whole.moments
    counts = m.octaves.copy()
    counts[:, 0] -= m.entries - m.both.diagonal()
    used = [b for b in range(OCTAVES) if counts[:, b].any()] or [0]
    bins = range(used[0], used[-1] + 1)
    names = [f"2^{b - OCTAVES + 1}" if b else "smaller" for b in bins]
    shares: dict[str, list[float | None]] = {
        label: [float(row[b]) / max(1, int(row.sum())) for b in bins] for label, row in zip(labels, counts, strict=True)
    }
    title = "Magnitudes of changes"
    alt = f"{title}, share of the entries that each model changes by powers of two: {extremes(shares, names)}."
    chart = Chart("histogram", title, names, shares, "from this to twice this", "share of changed entries", alt)
    return Section("Magnitudes", ("Entries that are not changed are left out.",), (chart,))


def spectra(found: Inspection, labels: Sequence[str], kinds: Places) -> Section:
    """Decay of singular values, and a table by kind."""
    text = (
        f"The {found.rank} leading singular values of each update of a linear layer's matrix. A direction counts as "
        "proven where its space lies within sin(angle) 0.1 of the true one; the squared norm behind the values found "
        "is exact, how it is spread over them is estimated (falling geometrically).",
        "Effective rank: exp of the entropy of the singular values. Stable rank: squared norm over the largest squared "
        f"value. Rank of {HELD:.0%}: the least that holds as much of the squared norm; largest over matrices.",
    )
    groups = [(name, group) for name, group in zip(kinds[1], kinds[2], strict=True) if group.spectra]
    columns = ("kind", "model", "matrices", "proven", "effective rank", "stable rank", f"rank of {HELD:.0%}", "held")
    rows = []
    for name, group in groups:
        for t, label in enumerate(labels):
            of = group.spectra
            values = [f(of, t) for f in (measures.certified, measures.effective_rank, measures.stable_rank)]
            held = max(s.ranks_held[t] for s in of)
            rows.append((name, label, len(of), *values, held, measures.captured(of, t)))
    length = max(len(values) for s in found.whole.spectra for values in s.values)
    decay = {
        label: [
            measures.average(
                measures.ratio(s.values[t][i], s.values[t][0]) for s in found.whole.spectra if i < len(s.values[t])
            )
            for i in range(length)
        ]
        for t, label in enumerate(labels)
    }
    title = "Singular values of updates"
    alt = f"{title} relative to the largest, mean over {len(found.whole.spectra)} matrices, {length} values."
    x = [float(i + 1) for i in range(length)]
    chart = Chart("line", title, x, decay, "number", "value / largest, mean over matrices", alt, log_y=True)
    return Section("Spectra", text, (chart,), (Table("Spectra by kind", columns, rows),))


def of_tensors(found: Inspection, labels: Sequence[str]) -> Section:
    ranked = sorted(found.tensors, key=lambda t: -max(v or 0.0 for v in measures.relative_norms(t.moments)))
    columns = ["tensor", "shape", *(f"{label}: update / weight" for label in labels)]
    columns += ["conflicting entries"] if len(labels) > 1 else []
    rows = []
    for tensor in ranked[:TENSORS_SHOWN]:
        m = tensor.moments
        row = [tensor.name, " x ".join(map(str, tensor.shape)), *measures.relative_norms(m)]
        rows.append(row + ([measures.conflicted(m)] if len(labels) > 1 else []))
    text = ()
    if len(ranked) > len(rows):
        text = (f"The {len(rows)} of {len(ranked)} tensors with the largest updates; --json has all.",)
    return Section("Tensors", text, tables=(Table("Tensors", columns, rows),), collapsed=True)


def left_out(found: Inspection, labels: Sequence[str]) -> Section:
    """What was not changed, and what was not compared."""
    same = found.untouched()
    rows = [(name, "unchanged in all models") for name in same[:TENSORS_SHOWN]]
    rows += list(found.left_out.items())[:TENSORS_SHOWN]
    text = [f"{len(same)} of {len(found.tensors)} tensors are those of the base in all models."]
    text += [f"{label}: {len(found.untouched(t))} untouched." for t, label in enumerate(labels)]
    text += [f"{len(found.left_out)} tensors were not compared."] if found.left_out else []
    tables = (Table("Tensors apart", ("tensor", "why"), rows),) if rows else ()
    return Section("Untouched and left out", [*text, *found.notes], tables=tables, collapsed=True)
