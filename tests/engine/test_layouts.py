"""Merges of models that store experts or values otherwise: same results, and transformers loads them."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.checkpoint import open_checkpoint
from pymerge.checkpoint.expert_layouts import Mapper
from pymerge.engine.local import merge_to_disk, plan_merge
from pymerge.engine.scaled import merge_scaled, merge_update
from pymerge.errors import RecipeError, ShapeMismatch
from tests.mixtures import CONFIGS, ONE_LAYOUT, equal, loaded, logits, made, save_both, values_of

transformers = pytest.importorskip("transformers")

PATHS = ("base", "one", "two")
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Architecture -> {base, one, two} -> {each, fused} -> folder, made when asked for."""
    known = {}

    def family(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            known[name] = {path: save_both(made(name, seed), folder / path) for seed, path in enumerate(PATHS)}
        return known[name]

    return family


def merged(places, layouts, out, **options):
    base, *models = (places[path][layout] for path, layout in zip(PATHS, layouts, strict=True))
    return pymerge.merge(base, models, out=out, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_mixed_layouts_give_the_bytes_of_equal_ones(families, name, tmp_path):
    places = families(name)
    for layout, other in (("each", "fused"), ("fused", "each")):
        plain, mixed = tmp_path / layout, tmp_path / f"{layout} mixed"
        merged(places, [layout] * 3, plain, method="ties", density=0.4)
        summary = merged(places, [layout, other, layout], mixed, method="ties", density=0.4)
        assert equal(values_of(plain), values_of(mixed))
        assert any("layout of experts" in note and "one" in note for note in summary["notes"])
        assert torch.isfinite(logits(loaded(mixed))).all()


def test_layouts_give_one_model(families, tmp_path):
    """What does not look at whole tensors is the same in both layouts, whatever the base's is."""
    places = families("MixtralConfig")
    for layout in ("each", "fused"):
        merged(places, [layout, "fused", "each"], tmp_path / layout, method="task_arithmetic", scale=0.4)
    each, fused = loaded(tmp_path / "each"), loaded(tmp_path / "fused")
    assert equal(each.state_dict(), fused.state_dict())
    assert "model.layers.0.block_sparse_moe.gate.weight" in values_of(tmp_path / "each")
    assert "model.layers.0.mlp.gate.weight" in values_of(tmp_path / "fused")


SPECTRAL = {
    "tsv_m": {"method": "tsv_m"},
    "iso_c": {"method": "iso_c"},
    "ace": {"method": "ace"},
    "task arithmetic, svc": {"method": "task_arithmetic", "calibrate": "svc"},
    "ties, svc": {"method": "ties", "density": 0.3, "calibrate": "svc"},
    "dare, tsv_m": {"method": "tsv_m", "purify": {"method": "dare", "density": 0.5}},
    "cart": {"method": "cart"},
}


@pytest.mark.parametrize("options", SPECTRAL.values(), ids=SPECTRAL)
def test_each_expert_is_decomposed_by_itself(families, options, tmp_path):
    """Bit for bit what a model with a tensor for each expert gives."""
    places = families("Qwen3MoeConfig")
    for layout in ("each", "fused"):
        merged(places, [layout] * 3, tmp_path / layout, **options)
    with open_checkpoint(tmp_path / "each") as each, open_checkpoint(tmp_path / "fused") as fused:
        view = Mapper(each, fused, "fused").run()
        assert all(torch.equal(view[name].load(), each[name].load()) for name in each)


def test_what_is_said_of_each_expert(families, tmp_path):
    places = families("Qwen3MoeConfig")
    facts = {}
    for layout in ("each", "fused"):
        facts[layout] = merged(places, [layout] * 3, tmp_path / layout, method="tsv_m")["per_tensor"]
    of_all = facts["fused"][f"{EXPERTS}.gate_up_proj"]
    assert set(of_all) == {f"{i}.{what}" for i in range(12) for what in ("gate_proj", "up_proj")}
    assert of_all["11.up_proj"] == facts["each"][f"{EXPERTS}.11.up_proj.weight"]


def test_excluded_experts_get_the_mean(families, tmp_path):
    places = families("Qwen3MoeConfig")
    merged(places, ["fused"] * 3, tmp_path / "out", method="tsv_m", spectral={"exclude": ["*.experts.*"]})
    base, *tasks = (values_of(places[path]["fused"]) for path in PATHS)
    name = f"{EXPERTS}.down_proj"
    expected = base[name].float() + sum(task[name].float() - base[name].float() for task in tasks) / 2
    assert torch.equal(values_of(tmp_path / "out")[name], expected.to(torch.bfloat16))


def test_one_update_of_experts_at_another_scale(families, tmp_path):
    """What a search over the scale does: the bytes of a merge at that scale."""
    places = families("Qwen3MoeConfig")

    def at(scale):
        base, *models = (places[path]["fused"] for path in PATHS)
        return pymerge.Recipe.from_kwargs(base, models, "tsv_m", scale=scale)

    merge_update(at(1.0), tmp_path / "update")
    found = merge_scaled(at(0.3), tmp_path / "update", tmp_path / "scaled")
    wanted = merge_to_disk(at(0.3), tmp_path / "merged")
    assert found["checksums"] == wanted["checksums"] and found["per_tensor"] == wanted["per_tensor"]


def test_experts_need_the_memory_of_one(tmp_path):
    """A tensor of 32 MB in a budget that its float32 values alone would exceed."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    for path in PATHS:
        save_file({name: torch.zeros(64, 512, 512, dtype=torch.bfloat16)}, tmp_path / f"{path}.safetensors")
    base, *models = (tmp_path / f"{path}.safetensors" for path in PATHS)
    plan = plan_merge(pymerge.Recipe.from_kwargs(base, models, "tsv_m"), pymerge.Options(memory=100_000_000))
    assert len(plan.items) == 64 and plan.counts == {"merged": 1, "copied": 0}
    assert max(item.peak_bytes for item in plan.items) < 30_000_000 < 4 * 64 * 512 * 512


def test_experts_are_split_already(families, tmp_path):
    places = families("Qwen3MoeConfig")
    with pytest.raises(RecipeError, match=f"split: {EXPERTS}.gate_up_proj is not merged .*or is no matrix"):
        merged(places, ["fused"] * 3, tmp_path / "out", method="tsv_m", split={"*.experts.gate_up_proj": 2})


def test_an_interrupted_merge_of_experts_goes_on(families, tmp_path, monkeypatch):
    """What is finished of a tensor of experts is not computed again."""
    from pymerge.engine import generic

    places = families("Qwen3MoeConfig")
    names, fails_at, real = [], [0], generic.merge_group

    def counted(steps, group, rule, adds):
        names.append(group.info.name)
        if len(names) == fails_at[0]:
            raise KeyboardInterrupt
        return real(steps, group, rule, adds)

    def run(out):
        names.clear()
        return merged(places, ["fused"] * 3, out, method="tsv_m", options=pymerge.Options(threads=1))

    monkeypatch.setattr(generic, "merge_group", counted)
    whole = run(tmp_path / "whole")
    every, fails_at[0] = list(names), 40
    assert len(every) == len(set(every)) > 72
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out")
    fails_at[0] = 0
    again = run(tmp_path / "out")
    assert 0 < len(names) <= len(every) - 30
    assert again["checksums"] == whole["checksums"] and again["per_tensor"] == whole["per_tensor"]


@pytest.mark.parametrize("name", ONE_LAYOUT)
def test_experts_the_other_way_round(name, tmp_path):
    """Llama 4: gate and up apart, in columns; gpt-oss: each expert's as one. Compared with the matrices themselves."""
    for seed, path in enumerate(PATHS):
        made(name, seed).save_pretrained(tmp_path / path)
    pymerge.merge(tmp_path / "base", [tmp_path / "one", tmp_path / "two"], method="tsv_m", out=tmp_path / "out")
    base, *tasks = (values_of(tmp_path / path) for path in PATHS)
    found = values_of(tmp_path / "out")
    checked = 0
    for key in base:
        if ".experts." not in key or base[key].dim() != 3:
            continue
        parts = [slice(0, 24), slice(24, 48)] if name.startswith("Llama4") and "gate_up" in key else [slice(None)]
        for expert in range(4):
            for columns in parts:
                single = [{"a.weight": model[key][expert][:, columns].clone()} for model in (base, *tasks)]
                expected = pymerge.merge(single[0], single[1:], method="tsv_m")["a.weight"]
                assert torch.equal(found[key][expert][:, columns], expected), key
                checked += 1
    assert checked >= 8
    assert torch.isfinite(logits(loaded(tmp_path / "out"))).all()


def test_in_memory_experts_are_decomposed_too():
    base, *models = (made("Qwen3MoeConfig", seed) for seed in range(3))
    found = pymerge.merge(base, models, method="tsv_m").state_dict()[f"{EXPERTS}.gate_up_proj"]
    single = [{"a.weight": m.state_dict()[f"{EXPERTS}.gate_up_proj"][7, 24:].clone()} for m in (base, *models)]
    assert torch.equal(found[7, 24:], pymerge.merge(single[0], single[1:], method="tsv_m")["a.weight"])


def test_another_number_of_experts_is_refused(families, tmp_path):
    places = families("Qwen3MoeConfig")
    folder = tmp_path / "fewer"
    shutil.copytree(places["one"]["fused"], folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t[:9].clone() if ".experts." in n else t for n, t in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ShapeMismatch, match=r"gate_up_proj: .*fewer has \[9, 48, 32\].*12 experts"):
        pymerge.merge(places["base"]["each"], [folder], method="task_arithmetic", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
