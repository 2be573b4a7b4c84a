"""Similarities of weights: against correlations of whole vectors; experts, whose units are parameters of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pymerge
from pymerge.align import Entry, Heads, Spec, Units
from pymerge.align import weights as weights_file
from pymerge.align.match import Match, unmoved
from pymerge.align.random_permutations import draw, random_permutations
from pymerge.align.weights import WeightSimilarity
from pymerge.checkpoint import open_checkpoint


def attention() -> tuple[Spec, dict[str, tuple[int, ...]]]:
    """Four query heads in two groups over a residual stream of 6, a fused axis, a flattened convolution."""
    heads = Heads(
        name="heads",
        heads=4,
        kv_heads=2,
        width=3,
        entries=(
            Entry(parameter="q", axis=0, role="out", view="q"),
            Entry(parameter="k", axis=0, role="out", view="k"),
            Entry(parameter="v", axis=0, role="out", view="v"),
            Entry(parameter="o", axis=1, role="in", view="o"),
        ),
    )
    residual = Units(
        name="residual",
        size=6,
        entries=(
            *(Entry(parameter=name, axis=1, role="in") for name in ("q", "k", "v")),
            Entry(parameter="o", axis=0, role="out"),
            Entry(parameter="fused", axis=0, role="out", part=(1, 2)),
            Entry(parameter="flat", axis=1, role="in", span=4),
            Entry(parameter="scale", axis=0, role="out", similarity=False),
        ),
    )
    shapes = {"q": (12, 6), "k": (6, 6), "v": (6, 6), "o": (6, 12), "fused": (12, 5), "flat": (7, 24), "scale": (6,)}
    return Spec(groups=(residual, heads)), shapes


def correlation(one: Tensor, other: Tensor) -> Tensor:
    n = len(one)
    return torch.corrcoef(torch.cat([one, other]).double())[:n, n:].float()


@pytest.mark.parametrize("slab", [1 << 24, 20])
def test_similarities_are_correlations_of_all_that_a_unit_has(slab, monkeypatch):
    """With the other groups where they are; however a parameter is cut into slabs."""
    monkeypatch.setattr(weights_file, "SLAB", slab)
    spec, shapes = attention()
    spec.check(shapes)
    generator = torch.Generator().manual_seed(0)
    one, other = ({n: torch.randn(s, generator=generator) + 0.1 for n, s in shapes.items()} for _ in range(2))
    order = random_permutations(spec, ("a", "b"), generator)
    placed = {
        group.name: Match(index={v: i[1] for v, i in order.index[group.name].items()}, values=(), gain=0.0, gap=None)
        for group in spec.groups
    }
    weights = WeightSimilarity(spec, [open_checkpoint(one), open_checkpoint(other)], cosine=False, memory=1 << 20)
    at = {view: index[1] for view, index in order.index["heads"].items()}
    moved = {"q": other["q"][at["q"]], "k": other["k"][at["k"]], "v": other["v"][at["v"]], "o": other["o"][:, at["o"]]}

    def vectors(state: dict[str, Tensor], by_head: dict[str, Tensor]) -> Tensor:
        parts = [by_head["q"].T, by_head["k"].T, by_head["v"].T, by_head["o"], state["fused"][6:]]
        return torch.cat([*parts, state["flat"].view(7, 6, 4).permute(1, 0, 2).reshape(6, -1)], 1)

    expected = correlation(vectors(one, one), vectors(other, moved))
    found = weights.scores(spec.group("residual"), 1, placed)["units"]
    assert (found - expected).abs().max() < 1e-5
    index = placed["residual"].index["units"]
    assert weights.matched(spec.group("residual"), 1, placed)["units"] == pytest.approx(
        float(expected[torch.arange(6), index].mean()), abs=1e-6
    )

    scores = weights.scores(spec.group("heads"), 1, placed)
    q, k = other["q"][:, index], other["k"][:, index]
    for j in range(2):
        for m in range(2):  # key-value head j of the anchor, m of the other, query heads in their own order
            rows = [
                torch.cat([x[0].view(2, 2, 3, 6)[y, s] for s in range(2)] + [x[1].view(2, 3, 6)[y]], 1)
                for x, y in (((one["q"], one["k"]), j), ((q, k), m))
            ]
            shared = scores["q"].view(2, 2, 3, 2, 2, 3)[j, :, :, m]
            found = scores["k"].view(2, 3, 2, 3)[j, :, m] + shared[0, :, 0] + shared[1, :, 1]
            assert (found - correlation(*rows)).abs().max() < 1e-5


def experts(count: int) -> tuple[Spec, dict[str, tuple[int, ...]]]:
    """A router, and experts of two layers each with an order of units of its own."""
    shapes: dict[str, tuple[int, ...]] = {"router": (count, 5)}
    groups = [
        Units(
            name="experts",
            size=count,
            entries=(Entry(parameter="router", axis=0, role="out"),),
            members=tuple((f"{e}.up", f"{e}.down") for e in range(count)),
        )
    ]
    for e in range(count):
        shapes |= {f"{e}.up": (8, 5), f"{e}.down": (5, 8)}
        entries = (Entry(parameter=f"{e}.up", axis=0, role="out"), Entry(parameter=f"{e}.down", axis=1, role="in"))
        groups.append(Units(name=f"expert {e}", size=8, entries=entries))
    return Spec(groups=tuple(groups)), shapes


def test_experts_in_another_order_are_found_and_so_are_their_units():
    spec, shapes = experts(4)
    generator = torch.Generator().manual_seed(1)
    one = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    order = random_permutations(spec, ("a", "b"), generator)
    other = {name: order.aligned(name, one[order.source(name, 1)], 1) for name in one}
    found = pymerge.find_permutations([one, other], spec=spec)
    for name, tensor in one.items():
        assert torch.equal(found.aligned(name, other[found.source(name, 1)], 1), tensor), name
    assert found.report["after"] == pytest.approx(1, abs=1e-5)


def test_a_match_is_known_by_where_units_go():
    group = Heads(name="h", heads=4, kv_heads=2, width=2, entries=())
    drawn = [
        Match(index=draw(group, torch.Generator().manual_seed(s)), values=(), gain=0.0, gap=None) for s in (0, 0, 1)
    ]
    assert drawn[0].key == drawn[1].key != drawn[2].key
    assert unmoved(group).key not in {match.key for match in drawn}
