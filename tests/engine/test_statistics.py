"""Statistics beside the models of a recipe: what methods get of them, and what is refused before anything is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pymerge
from pymerge.engine.plan import Options
from pymerge.errors import InputError, MergeError, RecipeError
from pymerge.methods.base import TaskGroup, TensorInfo
from pymerge.methods.regmean import RegMean
from tests.engine.observed import CONV, MODULES, OBSERVED, SHAPES, rows_of, saved, statistics_of
from tests.methods.moments import moments_of
from tests.models import family, read_model, same


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, list[Path]]:
    return family(tmp_path, 2, SHAPES)


def expected(base: Mapping[str, Tensor], tuned: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    merged = {name: base[name] + (sum(t[name] - base[name] for t in tuned) / len(tuned)) for name in base}
    for name in OBSERVED:
        module = name.removesuffix(".weight").removesuffix(".in_proj_weight")
        inputs = tuple(moments_of(rows_of(t, (MODULES | CONV)[module])) for t in range(len(tuned)))
        flip = module in CONV
        w, ws = base[name], [t[name] for t in tuned]
        if flip:
            w, ws = w.mT, [t.mT for t in ws]
        info = TensorInfo(name=name, shape=tuple(w.shape), tasks=len(ws))
        update = RegMean().combine(TaskGroup(info=info, base=w, tuned=tuple(ws), inputs=inputs))
        merged[name] = base[name] + (update.mT if flip else update)
    return merged


def test_disk_and_memory_give_the_formula(models, tmp_path: Path) -> None:
    base, tuned = models
    found = [statistics_of(i, path=path) for i, path in enumerate(tuned)]
    files = saved(found, tmp_path)
    summary = pymerge.merge(
        base, tuned, method="regmean", statistics=files, out=tmp_path / "out", options=Options(threads=3)
    )
    merged = read_model(tmp_path / "out")
    truth = expected(read_model(base), [read_model(path) for path in tuned])
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, truth[name], rtol=1e-5, atol=1e-6)
    pymerge.merge(base, tuned, method="regmean", statistics=found, out=tmp_path / "held", options=Options(threads=1))
    in_memory = pymerge.merge(
        read_model(base), [read_model(path) for path in tuned], method="regmean", statistics=found
    )
    assert same(merged, read_model(tmp_path / "held")) and same(merged, in_memory)
    facts = summary["per_tensor"]
    assert facts["layers.1.other.weight"] == {"regmean": "mean: no statistics"}
    assert all(facts[name]["regmean_condition"] >= 1.0 for name in OBSERVED)
    assert any("matrices without statistics of their input: 1: layers.1.other.weight" in n for n in summary["notes"])
    assert summary["recipe"]["models"][0]["statistics"] == str(files[0])
    assert [Path(i["path"]).name for i in summary["inputs"]][-2:] == [path.name for path in files]


def test_yaml(models, tmp_path: Path) -> None:
    base, tuned = models
    files = saved([statistics_of(i) for i in range(2)], tmp_path)
    listed = [{"model": str(m), "statistics": str(f)} for m, f in zip(tuned, files, strict=True)]
    raw = {"base_model": str(base), "models": listed, "merge_method": "regmean", "parameters": {"alpha": 0.5}}
    recipe = pymerge.Recipe.from_yaml(json.dumps(raw) + "\n")
    recipe.run(tmp_path / "out")
    pymerge.merge(base, tuned, method="regmean", alpha=0.5, statistics=files, out=tmp_path / "python")
    assert same(read_model(tmp_path / "out"), read_model(tmp_path / "python"))
    again = pymerge.Recipe.from_yaml(recipe.to_yaml())
    assert again.to_dict() == recipe.to_dict() and again.digest() == recipe.digest()


def test_split_matrices_share_the_input(models) -> None:
    base, tuned = models
    w0, ws = read_model(base), [read_model(path) for path in tuned]
    found = [statistics_of(i) for i in range(2)]
    whole = pymerge.merge(w0, ws, method="regmean", statistics=found)
    split = {"*.in_proj_weight": 3, "*.c_fc.weight": {"parts": 2, "dim": 1}}
    parts = pymerge.merge(w0, ws, method="regmean", statistics=found, split=split)
    for name in OBSERVED:  # every output row is solved alone
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-6, atol=1e-7)
    joined = pymerge.merge(w0, ws, method="regmean", statistics=found, join=[["*.q.weight", "*.k.weight"]])
    for name in OBSERVED:
        torch.testing.assert_close(joined[name], whole[name], rtol=1e-6, atol=1e-7)


def refused(models, found: Sequence[Any] | None, **more: Any) -> str:
    """The message of the plan that is refused; nothing was read but headers."""
    base, tuned = models
    given = {} if found is None else {"statistics": list(found)}
    with pytest.raises(MergeError) as caught:
        pymerge.plan_merge(pymerge.Recipe.from_kwargs(base, tuned, "regmean", **given, **more))
    assert isinstance(caught.value, InputError | RecipeError)
    return str(caught.value)


def test_no_statistics_or_too_few(models, tmp_path: Path) -> None:
    base, tuned = models
    message = refused(models, None)
    assert f"regmean needs `statistics: FILE` beside {tuned[0]}" in message and str(tuned[1]) in message
    assert "has 1 entries for 2 models" in refused(models, [statistics_of(0)])
    assert "must be a path or what `observe` returned, got dict" in refused(models, [{}, {}])
    with pytest.raises(RecipeError, match="must be a list with one entry a model"):
        pymerge.merge(base, tuned, method="regmean", statistics="x.stats", out=tmp_path / "out")
    with pytest.raises(RecipeError, match="task_arithmetic does not use it"):
        both = [statistics_of(0), statistics_of(1)]
        pymerge.merge(base, tuned, method="task_arithmetic", statistics=both, out=tmp_path / "out")
    assert "no statistics file" in refused(models, [base / "model.safetensors", statistics_of(1)])
    assert not (tmp_path / "out").exists()


def test_modules_that_are_missing_in_one_or_everywhere(models) -> None:
    _, tuned = models
    partial = {k: v for k, v in MODULES.items() if k != "layers.0.attn"}
    message = refused(models, [statistics_of(0), statistics_of(1, partial)])
    assert f"statistics of {tuned[1]}: nothing of layers.0.attn, layers.1.c_fc" in message
    message = refused(models, [statistics_of(i, {"encoder.q": "encoder.q"}) for i in range(2)])
    assert "of none of the matrices: they have modules encoder.q" in message and "layers.0.k.weight" in message


def test_other_widths_and_all_problems_at_once(models) -> None:
    _, tuned = models
    wrong = statistics_of(1, MODULES)
    wrong.held["layers.0.q"] = moments_of(torch.randn(9, 5))  # type: ignore[index]
    message = refused(models, [statistics_of(0), wrong])
    assert f"statistics of {tuned[1]}: the input of layers.0.q has 5 features, layers.0.q.weight [6, 6]" in message
    assert "layers.0.k.weight [4, 6]" in message and "nothing of layers.1.c_fc" in message


def test_inputs_that_do_not_fit_parts(models) -> None:
    found = [statistics_of(0), statistics_of(1)]
    message = refused(models, found, split={"*.q.weight": {"parts": 2, "dim": 1}, "*.c_fc.weight": 2})
    assert "layers.0.q.weight is cut along its input dimension" in message and "cut it along dim 1" in message
    message = refused(models, found, join=[["*.q.weight", "*.attn.in_proj_weight"]])
    assert "do not share their input" in message


def test_statistics_of_other_models(models, tmp_path: Path) -> None:
    base, tuned = models
    made = [statistics_of(i, path=path) for i, path in enumerate(tuned)]
    message = refused(models, made[::-1])
    assert message.count("give them in the models' order") == 2 and str(tuned[0]) in message
    other, _ = family(tmp_path / "other", 1, {"layers.0.q.weight": (6, 6)})
    assert "are not those of" in refused(models, [statistics_of(0, path=other), made[1]])
    moved = replace(made[0].header, model={**made[0].header.model, "path": "/elsewhere"})
    moved.model["files"] = [[n, s, t + 1, d] for n, s, t, d in moved.model["files"]]  # type: ignore[index]
    plan = pymerge.plan_merge(
        pymerge.Recipe.from_kwargs(base, tuned, "regmean", statistics=[replace(made[0], header=moved), made[1]])
    )
    assert any("/elsewhere" in note and "their time differs" in note for note in plan.notes)
    later = replace(moved, model={**moved.model, "path": made[0].header.model["path"]})
    assert "has been written since" in refused(models, [replace(made[0], header=later), made[1]])
