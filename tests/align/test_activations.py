"""Streamed correlations of activations against those of all samples at once, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pymerge.align import Heads, Spec, Tap, Units
from pymerge.align.activations import PairCollector
from pymerge.errors import InputError
from tests.align.nets import Mlp, mlp_spec


def samples_of(model: Mlp, batches: list[Tensor], layer: str) -> Tensor:
    """What goes into a layer, float64 [S, n]."""
    seen: list[Tensor] = []
    hook = getattr(model, layer).register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    hook.remove()
    return torch.cat(seen)


def correlation(*parts: Tensor) -> Tensor:
    return torch.corrcoef(torch.cat([x.T for x in parts])).nan_to_num()


def collect(spec: Spec, models: list, batches: list, **kwargs) -> PairCollector:
    collector = PairCollector(
        spec, [dict(model.named_modules()) for model in models], all_pairs=kwargs.get("all_pairs", False)
    )
    collector.run(models, batches)
    return collector


BATCHES = [torch.randn(rows, 10, generator=torch.Generator().manual_seed(rows)) for rows in (30, 7, 20)]


@pytest.mark.parametrize("offset", [0.0, 500.0])
def test_pairs_with_the_anchor(offset):
    """Also where the mean is hundreds of deviations: the shift keeps what float32 would lose."""
    models = [Mlp(seed) for seed in range(3)]
    with torch.no_grad():
        for model in models:
            model.fc0.bias += offset
    collector = collect(mlp_spec(), models, BATCHES)
    for layer, group, n in (("fc1", "h0", 24), ("fc2", "h1", 20)):
        samples = [samples_of(model, BATCHES, layer) for model in models]
        for t in (1, 2):
            found = collector.seen[group, "units"].scores(t)["units"]
            assert (found - correlation(samples[0], samples[t])[:n, n:]).abs().max() < (1e-5 if not offset else 1e-3)


def test_all_pairs():
    models = [Mlp(seed) for seed in range(3)]
    found = collect(mlp_spec(), models, BATCHES, all_pairs=True).all_scores()
    for layer, group in (("fc1", "h0"), ("fc2", "h1")):
        expected = correlation(*(samples_of(model, BATCHES, layer) for model in models))
        alive = expected.diagonal() > 0
        assert (found[group] - expected)[alive][:, alive].abs().max() < 1e-5
        assert (found[group] - found[group].T).abs().max() < 1e-6


class Attention(nn.Module):
    """Two projections and what is done with them, for taps."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.q_proj, self.k_proj, self.o_proj = nn.Linear(6, 8), nn.Linear(6, 4), nn.Linear(8, 6)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        k = self.k_proj(x)
        return self.o_proj(self.q_proj(x) * torch.cat([k, k], -1))


ATTENTION = Heads(
    name="attention",
    heads=4,
    kv_heads=2,
    width=2,
    entries=(),
    taps=(
        Tap(module="q_proj", side="output", view="q"),
        Tap(module="k_proj", side="output", view="k"),
        Tap(module="o_proj", side="input", view="o"),
    ),
)


def test_channels_of_a_head_are_seen_in_keys_and_in_all_its_queries():
    """The similarities of a channel's query rows and key row add up to one correlation over all their samples."""
    models = [Attention(0), Attention(1)]
    x = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(2)) + 1
    scores = collect(Spec(groups=(ATTENTION,)), models, [{"x": x}]).scores(1)["attention"]
    with torch.no_grad():
        seen = [
            [m.q_proj(x).view(-1, 2, 2, 2), m.k_proj(x).view(-1, 2, 2)] for m in models
        ]  # [S, kv, r, d], [S, kv, d]
    for j in range(2):
        for k in range(2):  # kv head j of the anchor with k of the other, query heads in their own order
            one = torch.cat([seen[0][0][:, j].reshape(-1, 2, 2).permute(1, 0, 2).reshape(-1, 2), seen[0][1][:, j]])
            other = torch.cat([seen[1][0][:, k].reshape(-1, 2, 2).permute(1, 0, 2).reshape(-1, 2), seen[1][1][:, k]])
            expected = correlation(one.double(), other.double())[:2, 2:]
            of_queries = scores["q"].view(2, 2, 2, 2, 2, 2)[j, :, :, k]  # [r, d, r, d]
            found = scores["k"].view(2, 2, 2, 2)[j, :, k] + of_queries[0, :, 0] + of_queries[1, :, 1]
            assert (found - expected).abs().max() < 1e-5


def test_padding_is_left_out():
    models = [Attention(0), Attention(1)]
    spec = Spec(groups=(ATTENTION,))
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    padded = collect(spec, models, [{"x": x, "attention_mask": mask}]).scores(1)["attention"]
    plain = collect(spec, models, [{"x": x[mask.bool()]}]).scores(1)["attention"]
    for view, expected in plain.items():
        assert (padded[view] - expected).abs().max() < 1e-6


class Shared(nn.Module):
    """One layer that runs twice in a pass."""

    def __init__(self, seed: int, times: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last, self.times = nn.Linear(6, 6), nn.Linear(6, 2), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.first(x).relu()
        return self.last(x)


def test_a_module_that_runs_twice_shows_both():
    models = [Shared(0), Shared(1)]
    spec = Spec(groups=(Units(name="g", size=6, entries=(), taps=(Tap(module="first", side="output"),)),))
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(3))
    found = collect(spec, models, [x]).scores(1)["g"]["units"]
    with torch.no_grad():
        steps = [[m.first(x), m.first(m.first(x).relu())] for m in models]
    expected = correlation(*(torch.cat(step).double() for step in steps))[:6, 6:]
    assert (found - expected).abs().max() < 1e-5
    for times in (3, 1, 0):
        with pytest.raises(InputError, match="first: model 1 does not run it on the samples that model 0 runs it on"):
            collect(spec, [Shared(0), Shared(1, times=times)], [x])


def test_a_tap_that_does_not_fit_says_so():
    spec = Spec(groups=(Units(name="g", size=7, entries=(), taps=(Tap(module="first"),)),))
    with pytest.raises(InputError, match="first: axis -1 of its input is 6 wide, the groups need 7"):
        collect(spec, [Shared(0), Shared(1)], [torch.zeros(2, 6)])
    spec = Spec(groups=(Units(name="g", size=7, entries=(), taps=(Tap(module="none"),)),))
    with pytest.raises(InputError, match="none: activations are seen at its input, model 0 has no such module"):
        collect(spec, [Shared(0), Shared(1)], [torch.zeros(2, 6)])


def test_models_are_left_in_the_mode_they_were_in():
    models = [Shared(0).train(), Shared(1).eval()]
    spec = Spec(groups=(Units(name="g", size=6, entries=(), taps=(Tap(module="first"),)),))
    collect(spec, models, [torch.zeros(2, 6)])
    assert [model.training for model in models] == [True, False]
    assert not models[0].first._forward_pre_hooks
