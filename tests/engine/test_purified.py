"""Purify steps for matrices in a merge: PAVE in front of every kind of combine step, with its search over the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pymerge
from pymerge.engine.plan import SLACK, Options
from pymerge.errors import RecipeError
from pymerge.methods.base import REGISTRY, ElementWiseCombine, TaskGroup, TensorInfo
from pymerge.methods.pave import Pave
from pymerge.runtime import emr
from tests.engine.observed import CONV, MODULES, OBSERVED, SHAPES, rows_of, saved, statistics_of
from tests.methods.moments import moments_of
from tests.models import family, read_model, same

TASKS = 3
PAVE = {"method": "pave", "rank_ratio": 0.7}
SETTINGS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"method": "task_arithmetic", "scale": 0.4},
    "ties": {"method": "ties"},
    "ties by tensor": {"method": "ties", "scope": "tensor"},
    "ties, mean ranks apart": {"method": "ties", "purify": [PAVE | {"allocation": "per_layer"}]},
    "dare": {"method": "task_arithmetic", "purify": [PAVE, {"method": "dare", "density": 0.5}]},
    "dare, ties": {"method": "ties", "purify": [PAVE, {"method": "dare", "density": 0.5}]},
    "emr": {"method": "emr", "split": {"*.c_fc.weight": {"parts": 2, "dim": 1}}},
    "pcb": {"method": "pcb"},
    "consensus": {"method": "consensus", "threshold": 0.3},
    "regmean": {"method": "regmean"},
    "tsv_m": {"method": "tsv_m"},
    "svc": {"method": "task_arithmetic", "calibrate": "svc"},
    "global ties, svc": {"method": "ties", "calibrate": "svc"},
}


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, list[Path]]:
    return family(tmp_path, TASKS, SHAPES)


def ratios(base: dict[str, Tensor], tuned: list[dict[str, Tensor]], parts: dict[str, int]) -> Pave:
    """The step after a search over all observed matrices; parts: in how many of them matrices are cut."""
    step, answer = Pave(rank_ratio=0.7), {}
    for name in OBSERVED:
        for i in range(parts.get(name, 1)):
            answer |= step.survey(part_of(name, base, tuned, i, parts.get(name, 1)))
    return step.decide(answer)  # type: ignore[return-value]


def part_of(name: str, base: dict[str, Tensor], tuned: list[dict[str, Tensor]], i: int, parts: int) -> TaskGroup:
    module = name.removesuffix(".weight").removesuffix(".in_proj_weight")

    def cut(t: Tensor) -> Tensor:
        return (t.mT if module in CONV else t).chunk(parts)[i]

    w, ws = cut(base[name]), tuple(cut(t[name]) for t in tuned)
    inputs = tuple(moments_of(rows_of(t, (MODULES | CONV)[module]), torch.float32) for t in range(len(tuned)))
    info = TensorInfo(name=f"{name}[{i}]", shape=tuple(w.shape), tasks=len(ws))
    return TaskGroup(info=info, base=w, tuned=ws, inputs=inputs)


def vectors(base: dict[str, Tensor], tuned: list[dict[str, Tensor]], step: Pave, parts: dict[str, int]) -> list:
    """The purified task vectors of the whole model, as stored."""
    found = [{name: t[name] - base[name] for name in base} for t in tuned]
    for name in OBSERVED:
        count = parts.get(name, 1)
        each = [step.purify(part_of(name, base, tuned, i, count)) for i in range(count)]
        for t in range(len(tuned)):
            whole = torch.cat([part[t] for part in each])
            found[t][name] = whole.mT if name.removesuffix(".weight") in CONV else whole
    return found


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_one_result_however_it_is_run(models, tmp_path: Path, setting: dict[str, Any]) -> None:
    base, tuned = models
    found = [statistics_of(i, path=path) for i, path in enumerate(tuned)]
    setting = {"purify": PAVE, **setting}
    results = []
    for i, options in enumerate([Options(threads=1), Options(memory=SLACK + (20 << 20), threads=3)]):
        given = {**setting, "statistics": found if i else saved(found, tmp_path)}
        summary = pymerge.merge(base, tuned, out=tmp_path / f"out{i}", options=options, **given)
        results.append(read_model(tmp_path / f"out{i}"))
        facts = [summary["per_tensor"][name] for name in OBSERVED]
        assert all(len(f.get("parts", [f])[0]["pave_ranks"]) == TASKS for f in facts)
    assert same(results[0], results[1])
    if setting["method"] != "emr":  # which leaves masks on disk
        state = [read_model(path) for path in tuned]
        assert same(results[0], pymerge.merge(read_model(base), state, statistics=found, **setting))


def test_emr_masks_are_of_the_purified_vectors(models, tmp_path: Path) -> None:
    base, tuned = models
    found = [statistics_of(i) for i in range(TASKS)]
    pymerge.merge(base, tuned, method="emr", purify=PAVE, statistics=found, out=tmp_path / "out")
    w0 = read_model(base)
    taus = vectors(w0, state := [read_model(path) for path in tuned], ratios(w0, state, {}), {})
    unified = {name: t - w0[name] for name, t in read_model(tmp_path / "out").items() if name in w0}
    shares = [sum(float(tau[name].abs().mean()) for name in w0) for tau in taus]
    for t in range(TASKS):
        task = emr.load(tmp_path / "out", base, t)
        used = {name: torch.where(taus[t][name] * unified[name] > 0, unified[name], 0.0) for name in w0}
        scale = shares[t] / sum(float(u.abs().mean()) for u in used.values())
        for name in w0:
            torch.testing.assert_close(task[name], w0[name] + scale * used[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", [{}, {"*.in_proj_weight": 3, "*.c_fc.weight": {"parts": 2, "dim": 1}}], ids=str)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_is_the_composition_of_its_steps(models, method: str, split: dict[str, Any]) -> None:
    """The search over the whole model, the purified vectors, and one combine step on their concatenation."""
    base, tuned = read_model(models[0]), [read_model(path) for path in models[1]]
    parts = {"layers.0.attn.in_proj_weight": 3, "layers.1.c_fc.weight": 2} if split else {}
    found = [statistics_of(i) for i in range(TASKS)]
    merged = pymerge.merge(base, tuned, method=method, purify=PAVE, statistics=found, split=split)
    step = ratios(base, tuned, parts)
    assert isinstance(step.rank_ratio, tuple) and len(set(step.rank_ratio)) > 1
    taus = vectors(base, tuned, step, parts)
    flat = [torch.cat([tau[name].reshape(-1) for name in base]) for tau in taus]
    combine = REGISTRY[method]()
    assert isinstance(combine, ElementWiseCombine)
    info = TensorInfo(name="", shape=tuple(flat[0].shape), tasks=TASKS)
    update = combine.combine(TaskGroup(info=info, base=None, tuned=tuple(flat)))
    expected = update + torch.cat([base[name].reshape(-1) for name in base])
    torch.testing.assert_close(torch.cat([merged[name].reshape(-1) for name in base]), expected, rtol=1e-5, atol=1e-6)


def test_joined_matrices_are_purified_as_one(models) -> None:
    base, tuned = read_model(models[0]), [read_model(path) for path in models[1]]
    found = [statistics_of(i) for i in range(TASKS)]
    step = {"method": "pave", "rank_ratio": 0.5, "allocation": "none", "metric": "none"}
    given: dict[str, Any] = {"method": "task_arithmetic", "scale": 1.0, "purify": step, "statistics": found}
    merged = pymerge.merge(base, tuned, join=[["*.q.weight", "*.k.weight"]], **given)
    names = ["layers.0.q.weight", "layers.0.k.weight"]
    w0 = torch.cat([base[name] for name in names]).double()
    expected = w0.clone()
    for t in tuned:
        w = torch.cat([t[name] for name in names]).double()
        u = torch.linalg.svd(w, full_matrices=False)[0][:, :3]
        expected += u @ u.mT @ w - w0
    torch.testing.assert_close(torch.cat([merged[name] for name in names]).double(), expected, rtol=1e-5, atol=1e-5)
    search = {**given, "purify": PAVE}
    assert not same(pymerge.merge(base, tuned, join=[["*.q.weight", "*.k.weight"]], **search), merged)


def test_matrices_without_statistics_keep_their_difference(models) -> None:
    base, tuned = read_model(models[0]), [read_model(path) for path in models[1]]
    found = [statistics_of(i) for i in range(TASKS)]
    given: dict[str, Any] = {"method": "task_arithmetic", "scale": 0.4}
    merged = pymerge.merge(base, tuned, purify=PAVE, statistics=found, **given)
    plain = pymerge.merge(base, tuned, **given)
    changed = [name for name in base if not torch.equal(merged[name], plain[name])]
    assert sorted(changed) == sorted(OBSERVED)


def test_a_search_reads_every_matrix_once_more(models) -> None:
    base, tuned = models
    found = [statistics_of(i) for i in range(TASKS)]

    def read(step: dict[str, Any]) -> int:
        recipe = pymerge.Recipe.from_kwargs(base, tuned, "task_arithmetic", purify=step, statistics=found)
        return pymerge.plan_merge(recipe).read_bytes

    matrices = sum(4 * torch.Size(SHAPES[name]).numel() for name in [*OBSERVED, "layers.1.other.weight"])
    assert read(PAVE) - read(PAVE | {"allocation": "none"}) == (TASKS + 1) * matrices


def test_what_does_not_go_together_is_refused(models, tmp_path: Path) -> None:
    base, tuned = models
    found = [statistics_of(i) for i in range(TASKS)]

    def refused(method: str, match: str, **given: Any) -> None:
        with pytest.raises(RecipeError, match=match):
            pymerge.merge(base, tuned, method=method, statistics=found, out=tmp_path / "out", **given)
        assert not (tmp_path / "out").exists()

    refused("ties", "pave needs the models' weights, not task vectors", purify=["dare", "pave"])
    refused("ties", "it goes with no join", purify="pave", join=[["*.q.weight", "*.k.weight"]])
    refused("emr", "tensor by tensor: no join", purify="pave", join=[["*.q.weight", "*.k.weight"]])
    with pytest.raises(RecipeError, match="pave needs `statistics: FILE`"):
        pymerge.merge(base, tuned, method="ties", purify="pave", out=tmp_path / "out")


def test_an_interrupted_merge_asks_again(models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = models
    found = [statistics_of(i) for i in range(TASKS)]
    given: dict[str, Any] = {"method": "ties", "purify": PAVE, "statistics": found}
    pymerge.merge(base, tuned, out=tmp_path / "whole", **given)
    purify, calls = Pave.purify, []

    def failing(self: Pave, group: TaskGroup) -> tuple[Tensor, ...]:
        calls.append(group.info.name)
        if len(calls) == 18:  # past the surveys of TIES, in the merge
            raise KeyboardInterrupt
        return purify(self, group)

    monkeypatch.setattr(Pave, "purify", failing)
    with pytest.raises(KeyboardInterrupt):
        pymerge.merge(base, tuned, out=tmp_path / "out", options=replace(Options(), threads=1), **given)
    monkeypatch.setattr(Pave, "purify", purify)
    pymerge.merge(base, tuned, out=tmp_path / "out", options=replace(Options(), threads=1), **given)
    assert same(read_model(tmp_path / "whole"), read_model(tmp_path / "out"))
