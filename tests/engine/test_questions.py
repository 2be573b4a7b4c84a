"""Methods that stream and are no rule (LiNeS, consensus, PCB, Fisher, those of mergekit): one result however it is run,
the formula's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import pymerge
from pymerge import methods
from pymerge.engine.plan import SLACK, Options
from pymerge.errors import MissingTensor, NonFinite, RecipeError, ShapeMismatch
from pymerge.recipe import Recipe
from tests.methods.test_consensus import consensus_truth
from tests.methods.test_fisher import fisher_truth
from tests.methods.test_pcb import pcb_truth
from tests.models import family, interrupted_after, random_tensors, read_model, same, write_model

SHAPES = {
    "model.embed_tokens.weight": (700, 300),
    "layers.0.w": (257, 129),
    "layers.0.b": (257,),
    "layers.1.w": (64, 64),
    "layers.2.w": (64, 64),
    "scalar": (),
    "empty": (0, 4),
}
TIGHT = SLACK + (17 << 20)  # the embedding goes through in tiles
WHOLE = SLACK + (40 << 20)  # steps before that must see all of it
SETTINGS: dict[str, dict[str, Any]] = {
    "consensus": {"method": "consensus", "threshold": [0.2, 0.4, 0.6]},
    "dare, then consensus": {"method": "consensus", "purify": "dare"},
    "pcb": {"method": "pcb"},
    "pcb tensor by tensor": {"method": "pcb", "scope": "tensor"},
    "trim, then pcb": {"method": "pcb", "purify": "trim"},
    "sce": {"method": "sce", "select_topk": 0.4},
    "nearswap": {"method": "nearswap", "t": 0.02},
    "arcee_fusion": {"method": "arcee_fusion"},
    "ram": {"method": "ram", "epsilon": 0.01},
    "ramplus_tl": {"method": "ramplus_tl", "epsilon": 0.01},
    "fisher": {"method": "fisher"},
    "fisher as given": {"method": "fisher", "normalize": False, "weight": [1.0, 0.5, 2.0]},
    "sum, then lines": {"method": "task_arithmetic", "scale": 1.0, "calibrate": "lines"},
    "global ties, then lines": {"method": "ties", "calibrate": {"method": "lines", "a": 0.5, "b": 1.0}},
    "pcb, then lines": {"method": "pcb", "calibrate": "lines"},
}


def importances(models: Sequence[Path]) -> list[Path]:
    """Fisher information of each model, as files beside them."""
    files = []
    for i, model in enumerate(models):
        squares = {name: t.square() * 10.0**-i for name, t in random_tensors(50 + i, SHAPES).items()}
        save_file(squares, file := model.with_suffix(".fisher.safetensors"))
        files.append(file)
    return files


def tensors_of(paths: Sequence[Path]) -> list[dict[str, Tensor]]:
    return [read_model(path) if path.is_dir() else read_file(path) for path in paths]


def read_file(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def inputs(
    setting: Mapping[str, Any], folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[Any, list[Path], dict]:
    """Base, models, and the setting with its Fisher files."""
    base, models = family(folder, 3, SHAPES, dtype)
    if setting["method"] in ("nearswap", "arcee_fusion"):
        models = models[:1]
    if setting["method"] == "fisher":
        return None, models, {**setting, "fisher": importances(models)}
    return base, models, dict(setting)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_one_result_however_it_is_run(tmp_path: Path, setting: dict[str, Any], dtype: torch.dtype) -> None:
    base, models, setting = inputs(setting, tmp_path, dtype)
    results = []
    whole = "purify" in setting or setting.get("scope") == "tensor" or methods.get(setting["method"]).unit == "tensor"
    tight = WHOLE if whole else TIGHT
    for i, options in enumerate([Options(threads=1), Options(memory=tight, threads=3)]):
        pymerge.merge(base, models, out=tmp_path / f"out{i}", options=options, **setting)
        results.append(read_model(tmp_path / f"out{i}"))
    if "fisher" in setting:
        setting["fisher"] = tensors_of(setting["fisher"])
    in_memory = pymerge.merge(base and read_model(base), tensors_of(models), **setting)
    assert all(same(results[0], other) for other in [*results[1:], in_memory])
    assert all(t.dtype == dtype for t in results[0].values())


def test_the_tight_budget_really_cuts(tmp_path: Path) -> None:
    base, models, setting = inputs(SETTINGS["pcb"], tmp_path)
    plan = pymerge.plan_merge(Recipe.from_kwargs(base, models, **setting), Options(memory=TIGHT))
    tiles = {item.entry.name: item.tile for item in plan.items if item.count}
    assert tiles["model.embed_tokens.weight"] < 210_000 and tiles["model.embed_tokens.weight"] % (1 << 14) == 0
    assert plan.read_bytes == 5 * sum(item.read_bytes for item in plan.items)  # four surveys and the merge


def deltas(base: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    return [torch.cat([(m[name] - base[name]).reshape(-1) for name in base]) for m in models]


def flat_update(base: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([(merged[name].double() - base[name].double()).reshape(-1) for name in base])


def test_pcb_ranks_the_whole_model(tmp_path: Path) -> None:
    base, models, setting = inputs(SETTINGS["pcb"], tmp_path)
    w0, tuned = read_model(base), tensors_of(models)
    update = flat_update(w0, pymerge.merge(w0, tuned, **setting))
    expected = pcb_truth(deltas(w0, tuned), 0.1, 1.0)
    assert torch.linalg.vector_norm(update - expected) < 1e-4 * torch.linalg.vector_norm(expected)


def test_consensus_is_its_formula(tmp_path: Path) -> None:
    base, models, setting = inputs(SETTINGS["consensus"], tmp_path)
    w0, tuned = read_model(base), tensors_of(models)
    update = flat_update(w0, pymerge.merge(w0, tuned, **setting))
    wrong = (update - consensus_truth(deltas(w0, tuned), (0.2, 0.4, 0.6), 2, 1.0)).abs() > 1e-6
    assert wrong.double().mean() < 1e-4


def test_fisher_divides_by_the_norm_over_all_parameters(tmp_path: Path) -> None:
    _, models, setting = inputs(SETTINGS["fisher"], tmp_path)
    tuned, fisher = tensors_of(models), tensors_of(setting["fisher"])
    merged = pymerge.merge(None, tuned, method="fisher", fisher=fisher, exclude=["layers.2.w"])
    names = [name for name in SHAPES if name != "layers.2.w"]
    norms = [float(torch.linalg.vector_norm(torch.cat([f[n].double().reshape(-1) for n in names]))) for f in fisher]
    for name in names:
        expected = fisher_truth([t[name] for t in tuned], [f[name] for f in fisher], norms, (1.0,) * 3)
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=2e-6)
    assert torch.equal(merged["layers.2.w"], tuned[0]["layers.2.w"])


def test_lines_follows_the_layers(tmp_path: Path) -> None:
    base, models = family(tmp_path, 4, SHAPES)
    setting = {"method": "task_arithmetic", "scale": 1.0, "calibrate": "lines"}
    summary = pymerge.merge(base, models, out=tmp_path / "out", **setting)
    w0, tuned, merged = read_model(base), tensors_of(models), read_model(tmp_path / "out")
    factors = {"layers.0.w": 0.25, "layers.0.b": 0.25, "layers.1.w": 0.625, "layers.2.w": 1.0}
    for name in SHAPES:
        expected = w0[name].double() + factors.get(name, 0.25) * sum(t[name].double() - w0[name] for t in tuned)
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=2e-6)
    noted = summary["per_tensor"]
    assert {name: noted[name]["lines"] for name in factors} == factors


@pytest.mark.parametrize("failing", [1, 3])
@pytest.mark.parametrize("name", ["pcb", "fisher"])
def test_an_interrupted_merge_asks_again(tmp_path: Path, name: str, failing: int) -> None:
    base, models, setting = inputs(SETTINGS[name], tmp_path)
    options = Options(memory=TIGHT, threads=1)
    pymerge.merge(base, models, out=tmp_path / "whole", **setting)
    with interrupted_after(failing):
        pymerge.merge(base, models, out=tmp_path / "out", options=options, **setting)
    assert (tmp_path / "out.partial").exists()
    pymerge.merge(base, models, out=tmp_path / "out", options=options, **setting)
    assert same(read_model(tmp_path / "out"), read_model(tmp_path / "whole"))


def test_recipe_with_fisher_files_reads_back(tmp_path: Path) -> None:
    _, models, setting = inputs(SETTINGS["fisher"], tmp_path)
    recipe = pymerge.Recipe.from_kwargs(None, models, **setting)
    assert [m["fisher"] for m in recipe.to_dict()["models"]] == [str(f) for f in setting["fisher"]]
    assert Recipe.from_dict(recipe.to_dict()).to_dict() == recipe.to_dict()
    summary = recipe.run(tmp_path / "out")
    assert len(summary["inputs"]) == 6 and json.loads((tmp_path / "out" / "merge.json").read_text())["recipe"]


def test_fisher_information_that_does_not_fit(tmp_path: Path) -> None:
    base, models, setting = inputs(SETTINGS["fisher"], tmp_path)
    tuned, fisher = tensors_of(models), tensors_of(setting["fisher"])
    merge = {"base": None, "models": tuned, "method": "fisher"}
    with pytest.raises(MissingTensor, match=r"layers.1.w: absent from the Fisher information of <models\[1\]"):
        pymerge.merge(**merge, fisher=[fisher[0], {n: t for n, t in fisher[1].items() if n != "layers.1.w"}, fisher[2]])
    with pytest.raises(ShapeMismatch, match=r"layers.0.b: F32 \[257\] in .*, its Fisher information is F32 \[3\]"):
        pymerge.merge(**merge, fisher=[*fisher[:2], fisher[2] | {"layers.0.b": torch.ones(3)}])
    with pytest.raises(NonFinite, match=r"layers.1.w: NaN or Inf in Fisher information of <models\[0\].*: 1 of 4096"):
        bad = fisher[0] | {"layers.1.w": fisher[0]["layers.1.w"].clone()}
        bad["layers.1.w"][3, 4] = float("nan")
        pymerge.merge(**merge, fisher=[bad, *fisher[1:]])
    with pytest.raises(RecipeError, match="fisher needs `fisher: FILE` beside <models"):
        pymerge.merge(**merge)
    with pytest.raises(RecipeError, match="fisher: has 1 entries for 3 models"):
        pymerge.merge(**merge, fisher=fisher[:1])
    with pytest.raises(RecipeError, match="fisher: must be a list"):
        pymerge.merge(**merge, fisher=fisher[0])
    with pytest.raises(RecipeError, match="linear does not use it"):
        pymerge.merge(None, tuned, method="linear", fisher=fisher)


def test_tied_head_takes_the_embeddings_fisher_information(tmp_path: Path) -> None:
    """A model that stores its tied head twice, with Fisher information under the embedding's name only."""
    shapes = {"model.embed_tokens.weight": (8, 4), "lm_head.weight": (8, 4)}
    config = {"model_type": "test", "tie_word_embeddings": True}
    models, files = [], []
    for i in range(2):
        embedding = random_tensors(i, shapes)["model.embed_tokens.weight"]
        models.append(write_model(tmp_path / f"m{i}", {n: embedding.clone() for n in shapes}, config))
        save_file({"model.embed_tokens.weight": torch.rand(8, 4)}, tmp_path / f"f{i}.safetensors")
        files.append(tmp_path / f"f{i}.safetensors")
    pymerge.merge(None, models, method="fisher", fisher=files, out=tmp_path / "out")
    merged = read_model(tmp_path / "out")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
