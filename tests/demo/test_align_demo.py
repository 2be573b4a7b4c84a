"""Part two of the demo on a schedule of seconds: the same path as `pymerge demo --align`, with small networks."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import nn

from pymerge.align.random_permutations import random_permutations

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from pymerge.demo import train  # noqa: E402
from pymerge.demo.align import halves, show  # noqa: E402
from pymerge.demo.data import digits  # noqa: E402


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(halves.KINDS, "conv", partial(halves.conv_net, 16))
        for kind, schedule in halves.SCHEDULES.items():
            patch.setitem(halves.SCHEDULES, kind, halves.Schedule(epochs=1, rate=schedule.rate, decay=0.1))
        patch.setattr(show, "ALPHAS", (0.25, 0.75))
        patch.setattr(show, "POINTS", 3)
        yield out, show.show(out)


def test_every_way_has_a_row_for_each_kind(results):
    out, found = results
    assert list(found["kinds"]) == ["conv net", "ViT"]
    for kind in found["kinds"].values():
        assert [row["name"] for row in kind["rows"]] == ["(model of 0 to 4)", "(model of 5 to 9)", *show.WAYS]
        assert [len(row["line"]) for row in kind["rows"] if row["name"] in show.LINES] == [3] * len(show.LINES)
        assert kind["rows"][-2]["alpha"] == max(kind["validation"], key=kind["validation"].get)
    assert json.loads((out / "results.json").read_text())["kinds"].keys() == found["kinds"].keys()


def test_aligned_or_not_the_ends_of_the_line_are_the_models(results):
    out, found = results
    with train.quiet_and_alone(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(halves, "train", None)  # nothing is trained again
        for (title, kind), name in zip(found["kinds"].items(), halves.KINDS, strict=True):
            models = [halves.trained(name, half, out) for half in (0, 1)]
            images = digits().test[: show.LINE]
            ends = [halves.loss(model, images) for model in models]
            for row in kind["rows"]:
                if "line" in row:
                    assert [row["line"][0], row["line"][-1]] == pytest.approx(ends, rel=1e-4), (title, row["name"])
            states = [model.state_dict() for model in models]
            merged = show.merged(models, None).state_dict()
            assert all(torch.allclose(merged[n], (states[0][n] + states[1][n]) / 2) for n in merged)


def test_a_half_is_trained_on_its_own_digits_alone():
    seen = []

    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(10))

        def forward(self, images):
            seen.append(images)
            return self.bias.expand(len(images), 10)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(halves.KINDS, "conv", Recorder)
        patch.setattr(halves, "shifted", lambda: digits().images.expand(9, -1, -1, -1, -1))
        model = halves.train("conv", range(5, 10), halves.Schedule(epochs=1, rate=0.1, decay=0.0))
    assert (model.bias[:5] == 0).all() and (model.bias[5:] != 0).any()
    training = halves.splits()[0]
    own = {image.numpy().tobytes() for image in digits().images[training[digits().digits[training] >= 5]]}
    assert {image.numpy().tobytes() for batch in seen for image in batch} <= own


def test_splits_are_disjoint_and_models_differ_in_their_start(monkeypatch, tmp_path):
    parts = halves.splits()
    assert len(torch.cat(parts).unique()) == sum(len(part) for part in parts) == 1797
    monkeypatch.setitem(halves.KINDS, "conv", partial(halves.conv_net, 8))
    monkeypatch.setitem(halves.SCHEDULES, "conv", halves.Schedule(epochs=1, rate=1e-9, decay=0.0))
    first, second = (halves.trained("conv", half, tmp_path).state_dict()["0.weight"] for half in (0, 1))
    assert (first - second).abs().mean() > 0.01


def test_units_of_the_networks_move_without_a_change():
    for kind in halves.KINDS:
        model = halves.KINDS[kind]().eval()
        units = random_permutations(halves.spec(kind, model), ("a", "b"), torch.Generator().manual_seed(0))
        tensors = {name: units.aligned(name, tensor, 1) for name, tensor in model.state_dict().items()}
        images = digits().images[:20]
        with torch.inference_mode():
            before = halves.logits(model, images)
            model.load_state_dict(tensors)
            torch.testing.assert_close(halves.logits(model, images), before, rtol=1e-4, atol=1e-4)
