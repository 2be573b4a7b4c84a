"""Part two of the demo from start to end: train, align and merge in each way, evaluate, table, picture."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import pymerge

ALPHAS = (0.1, 0.25, 0.5, 0.75, 0.9)
CHOSEN = "MuDSC, alpha chosen"
# Row -> options of find_permutations; None: nothing is aligned.
WAYS: dict[str, dict[str, Any] | None] = {
    "plain average": None,
    "weight matching": {"alpha": 1.0, "data": False},
    "activation matching": {"alpha": 0.0},
    "MuDSC": {"alpha": 0.5},
    CHOSEN: {},
    "zip": {"alpha": 0.5, "mode": "zip"},
}
LINES = ("plain average", "weight matching", "activation matching", CHOSEN)
SEEN = 500  # images whose activations are compared
POINTS, LINE = 11, 250  # of the line between the models; test images that its loss is taken of


def show(out: Path) -> dict[str, Any]:
    """See pymerge.demo.align.run."""
    absent = [name for name in ("sklearn", "transformers") if find_spec(name) is None]
    if absent:
        raise pymerge.MergeError(f'demo: {" and ".join(absent)} missing; install with: pip install "pymerge[demo]"')
    from pymerge.demo.align import halves
    from pymerge.demo.train import quiet_and_alone

    console = Console(highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"version": pymerge.__version__, "kinds": {}}
    with quiet_and_alone():
        for kind, title in halves.TITLES.items():
            start = time.perf_counter()
            models = [halves.trained(kind, half, out) for half in (0, 1)]
            console.print(f"  two of {title}: {time.perf_counter() - start:.0f} s")
            start = time.perf_counter()
            results["kinds"][title] = compare(kind, models)
            console.print(f"  merged in each way: {time.perf_counter() - start:.0f} s")
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    console.print(table(results["kinds"]))
    console.print(f"figures: {out / 'results.json'}")
    if find_spec("matplotlib") is None:
        console.print('no picture: matplotlib is missing; install with: pip install "pymerge[report]"')
    else:
        from pymerge.demo.align.landscape import draw

        console.print(f"loss between the models: {draw(results['kinds'], out / 'landscape.png')}")
    return results


def compare(kind: str, models: list[Any]) -> dict[str, Any]:
    """Rows of one kind of network, each with its accuracy on all ten digits of the test images and, for LINES, the
    loss on the line between the models."""
    from pymerge.demo.align import halves

    train, validation, test = halves.splits()
    own = [halves.accuracy(model, test, known) for known, model in zip(halves.HALVES, models, strict=True)]
    rows: list[dict[str, Any]] = [
        {"name": f"(model of {digits})", "accuracy": halves.accuracy(model, test)}
        for digits, model in zip(("0 to 4", "5 to 9"), models, strict=True)
    ]
    tried = {alpha: search(kind, models, train, alpha=alpha) for alpha in ALPHAS}
    scores = {alpha: halves.accuracy(merged(models, units), validation) for alpha, units in tried.items()}
    best = max(ALPHAS, key=lambda alpha: scores[alpha])
    for name, options in WAYS.items():
        if name == CHOSEN:
            units, alpha = tried[best], best
        else:
            units = search(kind, models, train, **options) if options is not None else None
            alpha = None if options is None else options["alpha"]
        row = {"name": name, "alpha": alpha, "accuracy": halves.accuracy(merged(models, units), test)}
        rows.append(row | ({"line": list(line(models, units, test[:LINE]))} if name in LINES else {}))
    return {"own": own, "validation": scores, "rows": rows}


def search(kind: str, models: list[Any], images: Any, *, data: bool = True, **options: Any) -> Any:
    """Permutations by weights, and by what the units see of the images: neither model has seen one half of them."""
    from pymerge.demo.align import halves

    batches = halves.digits().images[images[:SEEN]].split(100) if data else None
    groups = halves.spec(kind, models[0], tie_heads=options.get("mode") != "zip")
    return pymerge.find_permutations(models, batches, spec=groups, **options)


def merged(models: list[Any], units: Any, weight: float = 0.5) -> Any:
    return pymerge.merge(None, models, method="linear", weight=[1 - weight, weight], align=units)


def line(models: list[Any], units: Any, images: Any) -> Iterator[float]:
    """Loss over all ten digits from the first model to the second, aligned one."""
    from pymerge.demo.align import halves

    for point in range(POINTS):
        yield halves.loss(merged(models, units, point / (POINTS - 1)), images)


def table(kinds: dict[str, Any]) -> Table:
    own = "; ".join(f"{title} {a:.1%} and {b:.1%}" for title, (a, b) in ((t, k["own"]) for t, k in kinds.items()))
    out = Table(title="accuracy on 500 test images, all ten digits (%)", caption=f"each model on its own half: {own}")
    out.add_column("merged by", no_wrap=True)
    for title in kinds:
        out.add_column(title, justify="right", no_wrap=True)
        out.add_column("alpha", justify="right", no_wrap=True)
    for rows in zip(*(kind["rows"] for kind in kinds.values()), strict=True):
        cells = []
        for row in rows:
            alpha = row.get("alpha")
            cells += [f"{100 * row['accuracy']:.1f}", "" if alpha is None else f"{alpha:g}"]
        out.add_row(rows[0]["name"], *cells, end_section=rows[0]["name"] == "(model of 5 to 9)")
    return out
