"""S34-S37: singular systems, one bad matrix among many, NaN in selections, hostile assignment problems."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pymerge
from pymerge import linalg
from pymerge.errors import NonFinite
from pymerge.ops import TensorSurvey
from pymerge.ops.delta_merge import delta_merge
from pymerge.ops.delta_rule import DeltaRule, resolve
from tests.models import family, random_tensors, read_model, write_model

MATRICES = {f"layers.{i}.up.weight": (24, 16) for i in range(3)}
HARD_INPUTS = {
    "zero": torch.zeros(40, 16),
    "duplicate columns": torch.randn(40, 1, generator=torch.Generator().manual_seed(1)).expand(40, 16),
    "fewer samples than features": torch.randn(3, 16, generator=torch.Generator().manual_seed(2)),
}


class Layers(torch.nn.Module):
    """Three linear layers that see the same inputs, under the names of MATRICES."""

    def __init__(self, tensors) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for name in MATRICES:
            layer = torch.nn.Module()
            layer.up = torch.nn.Linear(16, 24, bias=False)
            layer.up.weight.data = tensors[name].clone()
            self.layers.append(layer)

    def forward(self, x):
        return torch.stack([layer.up(x) for layer in self.layers]).sum()


@pytest.mark.parametrize("inputs", HARD_INPUTS.values(), ids=HARD_INPUTS)
@pytest.mark.parametrize(
    "steps", [{"method": "regmean"}, {"method": "esm"}, {"method": "ties", "purify": "pave"}], ids=str
)
def test_S34_singular_covariances_give_finite_weights(steps, inputs):
    base, *tuned = (Layers(random_tensors(seed, MATRICES)) for seed in range(3))
    statistics = [pymerge.observe(model, [{"x": inputs}]) for model in tuned]
    merged = pymerge.merge(base, tuned, statistics=statistics, **steps).state_dict()
    for name, weight in merged.items():
        assert weight.isfinite().all() and weight.abs().max() < 100, name


@pytest.mark.parametrize("method", ["ace", "tsv_m", "iso_c", "wudi"])
def test_S34_updates_of_rank_one_give_finite_weights(method):
    base = random_tensors(0, MATRICES)
    change = {
        name: torch.outer(torch.arange(float(m)), torch.arange(float(n))) / m / n for name, (m, n) in MATRICES.items()
    }
    tuned = [{name: base[name] + t * change[name] for name in base} for t in (1, 2, 0)]
    merged = pymerge.merge(base, tuned, method=method)
    for name, weight in merged.items():
        assert weight.isfinite().all() and (weight - base[name]).abs().max() < 100, name


@pytest.mark.parametrize("method", ["tsv_m", "ace", "ties", "karcher"])
def test_S35_one_bad_matrix_is_named(tmp_path, method):
    base, children = family(tmp_path, 2, MATRICES)
    bad = read_model(children[1])
    bad["layers.1.up.weight"][3, 5] = torch.nan
    write_model(children[1], bad)
    with pytest.raises(NonFinite) as error:
        pymerge.merge(None if method == "karcher" else base, children, method=method, out=tmp_path / "out")
    text = str(error.value)
    assert (
        "layers.1.up.weight" in text and str(children[1]) in text and "layers.0" not in text and "layers.2" not in text
    )
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 100, 4095])
def test_S36_selections_and_elections_count_what_is_no_number(value, at):
    base = random_tensors(0, {"w": (64, 64)})["w"]
    tuned = [base + random_tensors(t, {"w": (64, 64)})["w"] for t in (1, 2)]
    tuned[1].view(-1)[at] = value
    rule = DeltaRule(weights=(1.0, 1.0), top=(2048, 2048), elect="mergekit", norm="weights")
    _, bad = delta_merge(resolve(rule, TensorSurvey(base, tuned)), base, tuned)
    assert bad[:3].tolist() == [0, 0, 1]


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "breadcrumbs_ties", "pcb", "consensus", "emr"])
def test_S36_methods_that_rank_or_elect_refuse_nan(tmp_path, method):
    base, children = family(tmp_path, 2)
    bad = read_model(children[0])
    bad["layers.0.up.weight"][0, 0] = torch.nan
    write_model(children[0], bad)
    with pytest.raises(NonFinite, match=r"layers\.0\.up\.weight"):
        pymerge.merge(base, children, method=method, out=tmp_path / "out")
    assert not list(Path(tmp_path).glob("out*"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_S37_assignment_refuses_what_is_no_number(value):
    score = random_tensors(0, {"s": (2, 5, 5)})["s"]
    score[1, 2, 3] = value
    with pytest.raises(ValueError, match="problem 1 of 2"):
        linalg.assign(score, True)


def test_S37_empty_rectangular_and_tied_assignments():
    assert linalg.assign(torch.empty(0, 0), True).columns.tolist() == []
    assert linalg.assign(torch.tensor([[1.0, 3.0, 2.0]]), True).columns.tolist() == [1]
    assert linalg.assign(torch.tensor([[1.0], [3.0], [2.0]]), True).columns.tolist() == [-1, 0, -1]
    assert linalg.assign(torch.zeros(4, 4), True).columns.tolist() == [0, 1, 2, 3]
