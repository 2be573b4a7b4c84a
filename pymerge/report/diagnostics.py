"""What the methods noted of each tensor, as charts over the depth of the model and one table of everything."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from statistics import fmean, median
from typing import Any

from pymerge.checkpoint import safe_name
from pymerge.recipe.stacks import LayerName
from pymerge.report.figures import Chart, Section, Table, finite

Facts = Mapping[str, Mapping[str, Any]]  # tensor -> fact -> value

MOST_PLACES = 200  # tensors along an axis, where names tell of no layers
LISTED = {"skipped", "skipped_tasks", "few_rows", "joined", "svc_eta_leading", "svc_before", "svc_after"}  # no charts


@dataclass(frozen=True)
class Fact:
    """How a fact is shown; `main`: in sight, the others behind a click. Facts of other methods go by their names."""

    label: str
    meaning: str
    main: bool = False
    log: bool = False


FACTS: Mapping[str, Fact] = {
    "svc_eta_mean": Fact(
        "SVC: mean divisor", "What SVC divides a direction by. Above 1: tasks share it, the sum counted it twice.", True
    ),
    "svc_eta_most": Fact("SVC: largest divisor", "The direction that is made smallest.", True),
    "svc_eta_least": Fact("SVC: smallest divisor", "The direction that is made largest; at least alpha."),
    "svc_suppressed": Fact("SVC: share of directions made smaller", "Directions with a divisor above 1.", True),
    "svc_amplified": Fact("SVC: share of directions made larger", "Directions with a divisor below 1."),
    "svc_at_alpha": Fact("SVC: share of directions at alpha", "Directions that no task responds to as merged."),
    "svc_silent": Fact("SVC: share of silent responses", "Pairs of task and direction that are rounding noise."),
    "svc_rank": Fact("SVC: directions", "How many directions were calibrated."),
    "svc_alpha": Fact("SVC: alpha", "The least coefficient of a task."),
    "gamma": Fact(
        "ACE: gamma", "How unequal the sizes of the updates are; above tau the branch is heterogeneous.", True
    ),
    "branch": Fact("ACE: branch", "Which system was solved."),
    "ebar": Fact("ACE: relative ridge", "Of the regularisation; where it is large, no refinement is made.", log=True),
    "cosine": Fact("ACE: cosine to the sum", "Between the merged update and the plain sum of the updates.", True),
    "sigma": Fact("ACE: size of the refinement", "Mean of the singular values that the refinement adds.", True),
    "pave_ranks": Fact("PAVE: ranks kept", "Directions of each model's inputs that its update keeps.", True),
    "pave_eps": Fact("PAVE: regularisation", "Added to the covariance of each model's inputs.", log=True),
    "layer_factor": Fact("ESM: layer scale", "What the layer's update is multiplied by.", True),
    "polar_ranks": Fact("rank of the orthogonal factors", "Left and right, after directions without size are dropped."),
    "condition": Fact("condition number", "Of the system that was solved; the larger, the fewer digits.", log=True),
    "smallest_ratio": Fact("smallest kept singular value", "Over the largest one.", log=True),
    "mean_singular_value": Fact("mean singular value", "Of the merged update.", True),
    "common_rank": Fact("Iso-CTS: common directions", "The rest is left to what each task adds.", True),
    "rank": Fact("rank", "Directions of each update that are kept."),
    "ranks": Fact("ranks kept", "Directions of each model's update that are kept.", True),
    "captured": Fact("CART: captured share", "Of what each task differs by, within the kept rank.", True),
    "nuclear_shares": Fact("STAR: kept share", "Of the sum of singular values of each update.", True),
    "loss": Fact("WUDI: interference", "Before and after the steps.", True, log=True),
    "lines": Fact("LiNeS: scale", "What the layer's update is multiplied by.", True),
    "regmean_condition": Fact("RegMean: condition number", "Of the summed covariances.", log=True),
    "regmean_silent": Fact("RegMean: silent inputs", "Inputs of the layer that no sample uses."),
    "error": Fact("relative error of the adapter", "What the rank leaves out of the update.", True),
}


def diagnostics(per_tensor: Facts, models: Sequence[str]) -> Iterator[Section]:
    """Sections: the main facts, the spectra, the others, every fact of every tensor. None where nothing was noted.

    per_tensor  of merge.json
    models      labels of the merged models: facts that are a number a model are drawn by model"""
    facts = dict(_flat(per_tensor))
    if not facts:
        return
    keys = list(dict.fromkeys(key for found in facts.values() for key in found))
    same, words, charts = [], [], {True: [], False: []}
    for key in sorted(keys, key=lambda key: (list(FACTS).index(key) if key in FACTS else len(FACTS), key)):
        fact = FACTS.get(key, Fact(key, ""))
        found = {name: own[key] for name, own in facts.items() if key in own}
        values = list(found.values())
        if len(values) > 1 and all(value == values[0] for value in values):
            same.append((fact.label, shown(values[0]), len(values), fact.meaning))
        elif all(isinstance(value, str | bool) for value in values):
            counts = {value: values.count(value) for value in dict.fromkeys(values)}
            words += [(fact.label, str(value), count, fact.meaning) for value, count in counts.items()]
        elif key not in LISTED and (chart := _chart(fact, found, models)):
            charts[fact.main].append(chart)
    columns = ("what", "value", "tensors", "meaning")
    yield Section(
        "Diagnostics",
        text=[f"What the methods noted of {len(facts)} tensors; each chart is a mean over the tensors of a place."],
        charts=charts[True],
        tables=[
            Table(title, columns, rows) for title, rows in (("The same everywhere", same), ("Cases", words)) if rows
        ],
    )
    if (spectra := _spectra(facts)) is not None:
        yield spectra
    if charts[False]:
        yield Section("More diagnostics", charts=charts[False], collapsed=True)
    rows = [(safe_name(name), *(shown(own.get(key)) for key in keys)) for name, own in facts.items()]
    every = Table("Everything noted", ("tensor", *keys), rows)
    yield Section("Diagnostics by tensor", tables=[every], collapsed=True)


def _flat(per_tensor: Facts) -> Iterator[tuple[str, dict[str, Any]]]:
    """Facts of matrices merged in parts, and of stacked experts, under names of their own."""
    for name, found in per_tensor.items():
        own = {key: value for key, value in found.items() if not isinstance(value, dict) and key != "parts"}
        if own:
            yield name, own
        for part, facts in enumerate(found.get("parts", ())):
            yield from _flat({f"{name}[{part}]": facts})
        for key, facts in found.items():
            if isinstance(facts, dict):
                yield from _flat({f"{name}/{key}": facts})


def shown(value: Any) -> str | float | int | None:
    """A fact as a cell."""
    if isinstance(value, list):
        return ", ".join(f"{one:.4g}" if isinstance(one, Real) else str(one) for one in value)
    return value if value is None or isinstance(value, int | float) else str(value)


class Places:
    """Where tensors stand: columns are layers, rows what is in a layer; without layers each tensor is a column."""

    def __init__(self, names: Sequence[str]) -> None:
        found = {name: LayerName.of(name) for name in names}
        layers = sorted({(at.stack, at.number) for at in found.values() if at is not None})
        self.layered = len(layers) > 1
        one = len({stack for stack, _ in layers}) == 1
        self.columns: list[str] = []
        self.of: dict[str, tuple[str, str]] = {}  # tensor -> column, row
        if self.layered:
            label = {(stack, n): str(n) if one else safe_name(f"{stack}.{n}") for stack, n in layers}
            self.columns = list(label.values())
            for name, at in found.items():
                if at is not None:
                    kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", at.rest)  # experts together
                    self.of[name] = label[at.stack, at.number], safe_name(kind.removesuffix(".weight"))
        else:
            self.columns = list(dict.fromkeys(safe_name(name) for name in names[:MOST_PLACES]))
            self.of = {name: (safe_name(name), "") for name in names[:MOST_PLACES]}

    def grid(self, values: Mapping[str, float | None], *, by_kind: bool) -> dict[str, list[float | None]]:
        """Row -> mean of the values at each column; one row, "mean", if not `by_kind`."""
        cells: dict[tuple[str, str], list[float]] = {}
        for name, value in values.items():
            if name in self.of and value is not None:
                column, kind = self.of[name]
                cells.setdefault((kind if by_kind else "mean", column), []).append(value)
        rows = dict.fromkeys(row for row, _ in cells)
        return {row: [fmean(c) if (c := cells.get((row, at))) else None for at in self.columns] for row in rows}


def _chart(fact: Fact, found: Mapping[str, Any], models: Sequence[str]) -> Chart | None:
    """Numbers: a heat map of layers and what is in them. Lists of one length: a line a member. Others: None."""
    places = Places(list(found))
    lengths = {len(value) if isinstance(value, list) else 0 for value in found.values()}
    if len(lengths) != 1 or not places.columns:
        return None
    if size := lengths.pop():
        if not all(isinstance(one, Real) for value in found.values() for one in value):
            return None
        members = models if len(models) == size else [str(n + 1) for n in range(size)]
        series: dict[str, list[float | None]] = {}
        for n, member in enumerate(members):
            grid = places.grid({name: finite(value[n]) for name, value in found.items()}, by_kind=False)
            series[member] = grid["mean"] if grid else [None] * len(places.columns)
        kind = "line"
    else:
        if not all(isinstance(value, Real) for value in found.values()):
            return None
        series = places.grid({name: finite(value) for name, value in found.items()}, by_kind=places.layered)
        kind = "heatmap" if places.layered else "bar"
    values = [value for row in series.values() for value in row if value is not None]
    if not values:
        return None
    alt = f"{fact.label}, from {min(values):.3g} to {max(values):.3g}, median {median(values):.3g}."
    return Chart(
        kind=kind,
        title=fact.label,
        x=places.columns,
        series=series,
        x_label="layer" if places.layered else "tensor",
        y_label="" if kind == "heatmap" else fact.label,
        alt=f"{alt} {fact.meaning}".strip(),
        log_y=fact.log and min(values) > 0,
    )


def _spectra(facts: Facts) -> Section | None:
    """Singular values of the updates before and after calibration, as far as SVC notes them."""
    found = [(own["svc_before"], own["svc_after"]) for own in facts.values() if own.get("svc_before")]
    if not found:
        return None
    places = [2**i for i in range(max(len(before) for before, _ in found))]
    largest = [max(before) or 1.0 for before, _ in found]

    def mean(which: int) -> list[float | None]:
        lists = [(pair[which], top) for pair, top in zip(found, largest, strict=True)]
        return [fmean(values[i] / top for values, top in lists if len(values) > i) for i in range(len(places))]

    series = {"before": mean(0), "after": mean(1)}
    alt = f"Before calibration the first direction has 1, direction {places[-1]} {series['before'][-1]:.2g} of that; "
    alt += f"afterwards {series['after'][0]:.2g} and {series['after'][-1]:.2g}."
    text = "Mean over the calibrated matrices, each over its largest value before; directions 1, 2, 4, 8 and on."
    axes = {"x_label": "direction", "y_label": "size of the update", "log_y": True}
    x = [str(place) for place in places]
    return Section(
        "Spectra before and after calibration", [text], [Chart("line", "Spectra", x, series, alt=alt, **axes)]
    )
