"""The greedy clustering against one that looks at every pair again, and the merge of clusters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import pymerge
from pymerge.align import Clusters, Entry, Heads, Spec, Units
from pymerge.align.zip import zip_units
from pymerge.errors import InputError
from tests.align.nets import Mlp, mlp_spec, scrambled


def slow_zip(scores: Tensor, models: int, decay: float, budget: float) -> tuple[Tensor, float]:
    """One group without blocks, by the words of the specification (3.9)."""
    state = scores.numpy().astype(np.float32).copy()
    n = len(state) // models
    np.fill_diagonal(state, -np.inf)
    members, label = [[i] for i in range(models * n)], [i // n for i in range(models * n)]
    left, values = [int(((models - 1) * n // models) * budget + 1e-4)] * models, []
    while len(members) > n:
        i, j = np.unravel_index(np.where(upper(state), state, -np.inf).argmax(), state.shape)
        values.append(float(state[i, j]))
        joined = np.float32(decay) * np.minimum(state[i], state[j])
        state[i], state[:, i] = joined, joined
        state[i, i] = -np.inf
        within = label[i] if label[i] == label[j] else None
        members[i] += members[j]
        state = np.delete(np.delete(state, j, 0), j, 1)
        del members[j], label[j]
        if within is not None:
            left[within] -= 1
            if left[within] <= 0:
                own = [at for at, of in enumerate(label) if of == within]
                state[np.ix_(own, own)] = -np.inf
    clusters = torch.empty(models * n, dtype=torch.int64)
    for number, units in enumerate(members):
        clusters[units] = number
    return clusters.view(models, n), sum(values) / len(values)


def upper(state: np.ndarray) -> np.ndarray:
    return np.triu(np.ones(state.shape, dtype=bool), 1)


def similarities(kind: str, n: int, models: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "ties":
        x = torch.randint(-2, 3, (models * n, models * n), generator=generator) / 4
        return torch.triu(x) + torch.triu(x, 1).T
    rank = {"positive": 3, "mixed": 40}[kind]
    samples = torch.randn(models * n, rank, generator=generator) + (1 if kind == "positive" else 0)
    return torch.corrcoef(samples)


@pytest.mark.parametrize("kind", ["positive", "mixed", "ties"])
@pytest.mark.parametrize(("models", "decay", "budget"), [(2, 0.5, 1.0), (2, 0.3, 0.125), (3, 0.5, 1.0), (2, 1.0, 0.0)])
@pytest.mark.parametrize("seed", range(3))
def test_the_greedy_takes_the_pairs_that_a_full_search_takes(kind, models, decay, budget, seed):
    scores = similarities(kind, 14, models, seed)
    expected, value = slow_zip(scores, models, decay, budget)
    found = zip_units(Units(name="g", size=14, entries=()), scores, models, decay, budget)
    assert torch.equal(found.clusters, expected)
    assert found.values[0] == pytest.approx(value, abs=1e-6)
    assert found.clusters.unique().tolist() == list(range(14))


def test_blocks_of_units_stay_together():
    scores = similarities("mixed", 12, 3, 0)
    found = zip_units(Units(name="g", size=12, entries=(), blocks=3), scores, 3, 0.5, 1.0)
    blocks = found.clusters.view(3, 3, 4) // 4  # of the merged model, by model and block
    assert torch.equal(blocks, blocks[..., :1].expand_as(blocks))
    assert all(sorted(of_model[:, 0].tolist()) == [0, 1, 2] for of_model in blocks)
    assert blocks[0, :, 0].tolist() == [0, 1, 2]


BATCHES = [torch.randn(60, 10, generator=torch.Generator().manual_seed(9))]


@pytest.mark.parametrize("data", [True, False])
def test_a_model_and_itself_in_another_order_give_the_model(data):
    """By their weights alone, whose search starts from the identity, in the same order."""
    spec, model, other = mlp_spec(), Mlp(4), Mlp(4)
    if data:
        other.load_state_dict(scrambled(model, spec, seed=0)[0])
    found = pymerge.find_permutations([model, other], BATCHES if data else None, spec=spec, mode="zip", zip_budget=0.0)
    assert isinstance(found, Clusters)
    states = [model.state_dict(), other.state_dict()]
    whole = Mlp(0)
    whole.load_state_dict(
        {n: torch.stack([found.aligned(n, s[n], t) for t, s in enumerate(states)]).mean(0) for n in states[0]}
    )
    x = torch.randn(20, 10, generator=torch.Generator().manual_seed(1))
    assert (whole(x) - model(x)).abs().max() < 1e-5
    assert 0.9 < found.report["after"] <= 1 + 1e-6


def test_clusters_are_means_where_units_are_made_and_sums_where_they_are_used():
    spec = Spec(
        groups=(
            Units(
                name="g",
                size=2,
                entries=(
                    Entry(parameter="fused", axis=0, role="out", part=(1, 2)),
                    Entry(parameter="after", axis=1, role="in", span=2),
                ),
            ),
        )
    )
    index = {"g": {"units": torch.tensor([[0, 0], [0, 1]])}}  # three units in the first cluster, one in the second
    clusters = Clusters(spec=spec, index=index, models=("a", "b"))
    fused = [torch.tensor([10.0, 20, 1, 2]), torch.tensor([30.0, 40, 3, 4])]
    mean = torch.stack([clusters.aligned("fused", x, t) for t, x in enumerate(fused)]).mean(0)
    assert mean.tolist() == pytest.approx([20, 30, 2, 4])
    after = [torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[5.0, 6, 7, 8]])]
    mean = torch.stack([clusters.aligned("after", x, t) for t, x in enumerate(after)]).mean(0)
    assert mean.tolist() == [[(1 + 3 + 5) / 2, (2 + 4 + 6) / 2, 7 / 2, 8 / 2]]
    assert torch.equal(clusters.aligned("other", after[0], 0), after[0])


def test_what_cannot_be_zipped_is_refused():
    heads = Heads(
        name="attention",
        heads=2,
        kv_heads=2,
        width=2,
        entries=(Entry(parameter="fc0.weight", axis=0, role="out", view="q"),),
    )
    spec = Spec(groups=(heads,), fixed=("*",))
    models = [Mlp(0, (10, 4, 6)), Mlp(1, (10, 4, 6))]
    with pytest.raises(InputError, match="this spec ties the heads of q, k and v: the mode zip"):
        pymerge.find_permutations(models, spec=spec, mode="zip")
