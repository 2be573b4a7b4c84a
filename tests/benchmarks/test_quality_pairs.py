"""Pairs of networks from different seeds: the same path as the quality suite's, with small networks; its verdicts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from scipy import stats

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from transformers import ViTForImageClassification  # noqa: E402

from benchmarks.quality import pairs, pairs_report  # noqa: E402
from pymerge.demo.align import halves  # noqa: E402
from pymerge.demo.train import quiet_and_alone  # noqa: E402

WAYS = ["plain average", "weights", "activations", "MuDSC", "MuDSC, alpha chosen"]
WAYS += [f"zip, {way}" for way in WAYS[1:]]


def small_transformer():
    config = halves.vision_transformer().config
    config.hidden_size = config.intermediate_size = 16
    return ViTForImageClassification(config)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(halves.KINDS, "conv", partial(halves.conv_net, 16))
        patch.setitem(halves.KINDS, "vit", small_transformer)
        for kind, schedule in halves.SCHEDULES.items():
            patch.setitem(halves.SCHEDULES, kind, halves.Schedule(epochs=1, rate=schedule.rate, decay=0.1))
        patch.setattr(pairs, "PAIRS", 2)
        patch.setattr(pairs, "ALPHAS", (0.5, 0.25))
        yield folder, pairs.run(folder, [3], lambda line: None)


def test_every_pair_is_merged_in_every_way(results):
    _, found = results
    names = [(cell["kind"], cell["tasks"]) for cell in found["cells"]]
    assert names == [(kind, tasks) for kind in ("conv net", "ViT") for tasks in ("same task", "halves")]
    for cell in found["cells"]:
        assert [pair["number"] for pair in cell["pairs"]] == [6, 7]
        for pair in cell["pairs"]:
            assert list(pair["ways"]) == WAYS
            one, other = pair["known"]
            assert sorted(one + other) == list(range(10)) if cell["tasks"] == "halves" else one == other
            for mode, alpha in pair["alpha"].items():
                same = pair["ways"][pairs.MODES[mode] + "MuDSC"] == pair["ways"][pairs.MODES[mode] + WAYS[4]]
                assert alpha == 0.25 or same, mode


def test_models_are_trained_once_and_figures_come_out_again(results):
    folder, found = results
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halves, "train", None)
        assert pairs.run(folder, [3], lambda line: None) == found


def test_figures_are_those_of_the_models(results):
    folder, found = results
    of = next(cell for cell in found["cells"] if (cell["kind"], cell["tasks"]) == ("conv net", "halves"))["pairs"][0]
    with quiet_and_alone():
        models, known = pairs.pair("conv", "halves", of["number"], folder)
        head = [model.state_dict()["12.weight"] for model in models]
        test = halves.splits()[2]
        mean = halves.conv_net(16)
        mean.load_state_dict(
            {name: (a + models[1].state_dict()[name]) / 2 for name, a in models[0].state_dict().items()}
        )
        plain, single = halves.accuracy(mean, test), [halves.accuracy(mean, test, digits) for digits in known]
    assert all((weights[other] == 0).all() for weights, other in zip(head, known[::-1], strict=True))
    assert all((weights[own] != 0).all() for weights, own in zip(head, known, strict=True))
    assert of["ways"]["plain average"] == pytest.approx({"joint": plain, "each": sum(single) / 2})
    assert of["ways"]["activations"] != of["ways"]["plain average"]


def test_a_pair_s_models_differ_in_seed_and_pairs_do_in_tasks(results):
    folder, found = results
    with quiet_and_alone():
        of = [pairs.pair("conv", "same task", number, folder)[0] for number in (6, 7)]
    first = [model.state_dict()["0.weight"] for two in of for model in two]
    assert not any(torch.equal(first[i], first[j]) for i in range(4) for j in range(i))
    halved = next(cell for cell in found["cells"] if cell["tasks"] == "halves")
    assert halved["pairs"][0]["known"] != halved["pairs"][1]["known"]


def made(weights: list[float], activations: list[float], mudsc: list[float]) -> dict:
    """Two cells alike, of what `run` returns; zip rows and chosen alphas have the activations' figures."""
    of = {"weights": weights, "activations": activations, "MuDSC": mudsc}
    ways = [[(way, of.get(way, activations)[n]) for way in WAYS] for n in range(len(mudsc))]
    found = [
        {"own": [0.9, 0.8], "ways": {way: {"joint": value / 100, "each": 1.0} for way, value in pair}} for pair in ways
    ]
    return {"cells": [{"kind": "net", "tasks": tasks, "pairs": found} for tasks in ("same task", "halves")]}


@pytest.mark.parametrize(
    ("mudsc", "says"),
    [
        ([80.0, 83.0, 81.0, 85.0], "holds"),
        ([60.0, 63.0, 61.0, 65.0], "does not hold here"),
        ([80.0, 60.0, 81.0, 61.0], "within the noise"),
    ],
)
def test_verdict_is_a_paired_test_against_the_better_space(mudsc, says):
    activations = [70.0, 71.0, 72.0, 73.0]
    found = pairs_report.verdict(made([75.0, 65.0, 66.0, 67.0], activations, mudsc))
    expected = stats.ttest_rel(mudsc, activations)
    for row in (found["rows"][0], found["overall"][0]):
        assert row["way"] == "MuDSC" and row["verdict"] == says
        assert (row["t"], row["p"]) == pytest.approx((expected.statistic, expected.pvalue))
        assert row["points"] == pytest.approx(sum(mudsc) / 4 - 71.5)
    assert found["rows"][0]["against"] == "activations"
    assert f"MuDSC: {says} ({sum(mudsc) / 4 - 71.5:+.1f}" in found["text"]
    other = next(row for row in found["rows"] if row["way"] == "zip, MuDSC")
    assert (other["points"], other["p"], other["verdict"]) == (0.0, 1.0, "within the noise")


def test_verdict_needs_two_pairs():
    with pytest.raises(ValueError, match="1 pairs have no standard error"):
        pairs_report.verdict(made([50.0], [60.0], [70.0]))


def test_table_has_means_and_errors():
    text = pairs_report.table(made([50.0, 52.0], [60.0, 60.0], [62.0, 66.0]))
    rows = {cells[1].strip(): cells[2].strip() for cells in (line.split("|") for line in text.splitlines())}
    assert rows["(each model on what it knows)"] == "85.0 ± 2.9"  # of 90, 80, 90, 80
    assert (rows["weights"], rows["MuDSC"]) == ("51.0 ± 1.0", "64.0 ± 2.0")
    assert rows["MuDSC, less the better single space"] == "+4.0 ± 2.0: within the noise"


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    out = pairs_report.draw(made([50.0, 52.0], [60.0, 60.0], [62.0, 66.0]), tmp_path / "pairs.png")
    assert out.read_bytes().startswith(b"\x89PNG")
