"""Models whose units are in another order: found, put in one order while they are read, merged; end to end."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import pymerge
from pymerge.align.permutations import identity
from pymerge.align.random_permutations import random_permutations
from pymerge.align.specs import floating_shapes, spec_for
from pymerge.engine.scaled import why_merged_anew
from pymerge.errors import InputError, OutputError, RecipeError
from pymerge.recipe import Recipe
from tests.adapters import adapted, random_factors, write_adapter
from tests.models import interrupted_after, read_model, same, write_model

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
KINDS = {
    "bert": ("BertForSequenceClassification", SMALL | {"vocab_size": 96, "num_labels": 3}),
    "llama": ("LlamaForCausalLM", SMALL | {"vocab_size": 96, "num_key_value_heads": 2}),
    "vit": ("ViTForImageClassification", SMALL | {"image_size": 8, "patch_size": 2, "num_channels": 1}),
}
FIND = {"method": "mudsc"}


def batches(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "vit":
        return [{"pixel_values": torch.randn(64, 1, 8, 8, generator=generator)}]
    return [{"input_ids": torch.randint(0, 96, (32, 12), generator=generator)} for _ in range(2)]


def tuned(tensors, seed, share=0.3):
    """Far from `tensors` in every entry, and nearer to it than to any model with its units moved."""
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    return {name: tensor + share * tensor.std(correction=0) * noise[name] for name, tensor in tensors.items()}


@pytest.fixture(scope="module", params=list(KINDS))
def models(request, tmp_path_factory):
    """base, a and b of one architecture; b moved is b with its units in another order."""
    folder = tmp_path_factory.mktemp(request.param)
    name, kwargs = KINDS[request.param]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**kwargs))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and scales too, so that no two units are alike
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder / "base")
    base, config = load_file(folder / "base" / "model.safetensors"), model.config.to_dict()
    found = {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)}
    permutations = random_permutations(spec_for(floating_shapes(base), config), ("b", "moved"), generator(3))
    found["moved"] = {name: permutations.aligned(name, tensor, 1) for name, tensor in found["b"].items()}
    described = json.loads((folder / "base" / "config.json").read_text())
    for label in ("a", "b", "moved"):
        write_model(folder / label, found[label], described, shards=2 if label == "moved" else 1)
    return request.param, folder


def generator(seed):
    return torch.Generator().manual_seed(seed)


def merge(models, out, labels=("a", "moved"), base=None, **keywords):
    _, folder = models
    found = [str(folder / label) if "+" not in str(label) else label for label in labels]
    summary = pymerge.merge(folder / base if base else None, found, out=out, **{"method": "linear"} | keywords)
    return read_model(out), summary


def search(models, **options):
    return FIND | {"data": batches(models[0])} | options


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_a_scrambled_model_merges_as_itself(models, tmp_path, method):
    given = {"t": 0.4} if method == "slerp" else {}
    expected, _ = merge(models, tmp_path / "plain", ("a", "b"), method=method, **given)
    merged, summary = merge(models, tmp_path / "out", align=search(models), method=method, **given)
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)
    said = json.loads((tmp_path / "out" / "merge.json").read_text())["align"]
    assert said == json.loads(json.dumps(summary["align"])) and said["after"] > said["before"] + 0.1
    assert all(group["moved"][0] > 0 for group in said["groups"].values())
    assert summary["recipe"]["align"] == {"method": "mudsc", "data": "<data in memory>"}


def test_task_vectors_are_taken_in_the_order_of_the_base(models, tmp_path):
    expected, _ = merge(models, tmp_path / "plain", ("a", "b"), base="base", method="ties")
    merged, summary = merge(models, tmp_path / "out", base="base", method="ties", align=search(models))
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)
    assert [label.rsplit("/", 1)[1] for label in summary["align"]["models"]] == ["base", "a", "moved"]


@pytest.mark.parametrize("share", [1, 20], ids=["triangle", "samples"])
def test_statistics_follow_their_models(models, tmp_path, share):
    kind, folder = models
    few = [{key: value[: len(value) // share, :4] for key, value in batches(kind)[0].items()}]
    if kind == "vit":
        few = [{"pixel_values": batches(kind)[0]["pixel_values"][: 64 // share]}]
    seen = {label: pymerge.observe(folder / label, few) for label in ("a", "b", "moved")}
    for label, found in seen.items():
        found.save(tmp_path / f"{label}.stats.safetensors")
    read = {label: tmp_path / f"{label}.stats.safetensors" for label in seen}
    regmean = {"base": "base", "method": "regmean"}
    expected, _ = merge(models, tmp_path / "plain", ("a", "b"), statistics=[seen["a"], seen["b"]], **regmean)
    for name, given in (("held", seen), ("read", read)):
        statistics = [given["a"], given["moved"]]
        merged, _ = merge(models, tmp_path / name, statistics=statistics, align=search(models), **regmean)
        for key, tensor in expected.items():
            torch.testing.assert_close(merged[key], tensor, rtol=0, atol=2e-4 * float(tensor.abs().max()))


def test_permutations_found_before_give_the_same_bytes(models, tmp_path):
    kind, folder = models
    labels = [str(folder / "a"), str(folder / "moved")]
    units = pymerge.find_permutations(labels, batches(kind))
    units.save(tmp_path / "perms.safetensors")
    found, _ = merge(models, tmp_path / "found", align=search(models))
    given, _ = merge(models, tmp_path / "given", align=units)
    read, summary = merge(models, tmp_path / "read", align=tmp_path / "perms.safetensors")
    assert same(found, given) and same(found, read)
    assert summary["align"]["groups"] == units.report["groups"]
    turned, _ = merge(models, tmp_path / "turned", ("moved", "a"), align=units)  # the file knows which is which
    assert same(found, turned)


def test_modules_and_state_dicts_in_memory(models):
    kind, folder = models
    cls = getattr(transformers, KINDS[kind][0])
    loaded = [cls.from_pretrained(folder / label) for label in ("a", "moved", "b")]
    merged = pymerge.merge(None, loaded[:2], method="linear", align=search(models, spec=kind))
    expected = pymerge.merge(None, [loaded[0], loaded[2]], method="linear")
    before, after = (model.state_dict() for model in (expected, merged))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
    path = folder / "samples.txt"
    path.write_text("a sample\n")
    with pytest.raises(RecipeError, match="the models are in memory: give batches"):
        pymerge.merge(None, loaded[:2], method="linear", align=FIND | {"spec": kind, "data": path})
    units = pymerge.find_permutations(loaded[:2], batches(kind))
    states = pymerge.merge(None, [m.state_dict() for m in loaded[:2]], method="linear", align=units)
    assert all(torch.equal(states[name], tensor) for name, tensor in after.items())


@pytest.mark.parametrize("mode", ["permute", "zip"])
def test_tied_parameters_of_modules_stay_tied(mode):
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=40, n_positions=16)
    loaded = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        loaded.append(transformers.GPT2LMHeadModel(config))
    batch = {"input_ids": torch.randint(0, 40, (8, 12), generator=generator(0))}
    units = pymerge.find_permutations(loaded, [batch], mode=mode)
    merged = pymerge.merge(None, loaded, method="linear", align=units).state_dict()
    assert torch.equal(merged["lm_head.weight"], merged["transformer.wte.weight"])
    tensors = [model.state_dict()["transformer.wte.weight"] for model in loaded]
    shares = [units.aligned("transformer.wte.weight", tensor, t) for t, tensor in enumerate(tensors)]
    assert not torch.equal(shares[1], tensors[1])
    torch.testing.assert_close(merged["lm_head.weight"], (shares[0] + shares[1]) / 2, rtol=0, atol=1e-7)


@pytest.mark.parametrize("after", [1, 5])
def test_an_interrupted_merge_goes_on(models, tmp_path, after):
    whole, _ = merge(models, tmp_path / "whole", align=search(models))
    with interrupted_after(after):
        merge(models, tmp_path / "out", align=search(models))
    with pytest.raises(OutputError, match=r"not this one: (.|\n)*alpha"):
        merge(models, tmp_path / "out", align=search(models, alpha=0.25))
    resumed, _ = merge(models, tmp_path / "out", align=search(models))
    assert same(resumed, whole)


def test_other_permutations_do_not_go_on(models, tmp_path):
    kind, folder = models
    units = pymerge.find_permutations([folder / "a", folder / "moved"], batches(kind))
    units.save(tmp_path / "perms.safetensors")
    with interrupted_after(1):
        merge(models, tmp_path / "out", align=tmp_path / "perms.safetensors")
    replace(units, index=identity(units.spec, units.models).index).save(tmp_path / "perms.safetensors")
    with pytest.raises(OutputError, match="permutations"):
        merge(models, tmp_path / "out", align=tmp_path / "perms.safetensors")


@pytest.mark.parametrize("models", ["bert", "vit"], indirect=True)
def test_a_zip_is_the_mean_of_its_shares(models, tmp_path):
    kind, folder = models
    units = pymerge.find_permutations([folder / "a", folder / "moved"], batches(kind), mode="zip")
    merged, summary = merge(models, tmp_path / "out", align=units)
    tensors = [read_model(folder / label) for label in ("a", "moved")]
    for name, tensor in merged.items():
        shares = [units.aligned(name, model[name], t) for t, model in enumerate(tensors)]
        torch.testing.assert_close(tensor, sum(shares) / 2, rtol=0, atol=1e-6)
    assert summary["align"]["groups"] and summary["tensors"]["merged"] == len(merged)
    half = [{name: tensor.bfloat16() for name, tensor in model.items()} for model in tensors]
    for name, tensor in pymerge.merge(None, half, method="linear", align=units).items():  # rounded once, at the end
        shares = [units.aligned(name, model[name], t) for t, model in enumerate(half)]
        assert torch.equal(tensor, ((shares[0] + shares[1]) / 2).bfloat16())


@pytest.mark.parametrize("models", ["bert"], indirect=True)
def test_an_architecture_without_groups_is_refused_by_the_plan(models):
    labels = [{"model": str(models[1] / label), "parameters": {"weight": 1}} for label in ("a", "moved")]
    raw = {"models": labels, "merge_method": "linear", "align": FIND | {"spec": "brt"}}
    with pytest.raises(InputError, match="did you mean 'bert'"):
        pymerge.plan_merge(Recipe.from_dict(raw))


@pytest.mark.parametrize(
    "keywords",
    [
        {"method": "slerp", "t": 0.5},
        {"exclude": ["*.bias"]},
        {"weight": [0.3, 0.7]},
        {"weight": 1.0, "normalize": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("models", ["bert"], indirect=True)
def test_a_zip_is_nothing_but_the_mean(models, tmp_path, keywords):
    with pytest.raises(RecipeError, match="a zip is the mean of all models"):
        merge(models, tmp_path / "out", align=search(models, mode="zip"), **keywords)


@pytest.mark.parametrize("models", ["bert"], indirect=True)
def test_permutations_of_other_models_are_refused(models, tmp_path):
    kind, folder = models
    units = pymerge.find_permutations([folder / "a", folder / "moved"], batches(kind))
    config = json.loads((folder / "base" / "config.json").read_text())
    other = write_model(tmp_path / "other", read_model(folder / "a"), config, shards=3)
    refused = {
        "not one of the models that were aligned": (None, [folder / "a", other], "linear"),
        "base is not one of the models": (folder / "base", [folder / "a", folder / "moved"], "ties"),
    }
    for said, (base, found, method) in refused.items():
        with pytest.raises(InputError, match=said):
            pymerge.merge(base, found, method=method, align=units, out=tmp_path / "out")
    write_model(tmp_path / "c", read_model(folder / "a"), config)
    units = pymerge.find_permutations([tmp_path / "c", folder / "moved"])
    write_model(tmp_path / "c", read_model(folder / "b"), config)
    with pytest.raises(InputError, match="has been written since it was aligned"):
        pymerge.merge(None, [tmp_path / "c", folder / "moved"], method="linear", align=units, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("models", ["bert"], indirect=True)
def test_groups_from_python(models, tmp_path):
    kind, folder = models
    spec = spec_for(
        floating_shapes(read_model(folder / "a")), json.loads((folder / "base" / "config.json").read_text())
    )
    expected, _ = merge(models, tmp_path / "named", align=search(models))
    merged, summary = merge(models, tmp_path / "out", align=search(models, spec=spec))
    assert same(merged, expected) and summary["recipe"]["align"]["spec"] == "<in memory>"


@pytest.mark.parametrize("models", ["bert"], indirect=True)
def test_files_of_one_archive_are_told_by_path_then_by_place(models, tmp_path):
    """Same size, header and time: only contents differ."""
    kind, folder = models
    config = json.loads((folder / "base" / "config.json").read_text())

    def written(name, label):
        path = write_model(tmp_path / name, read_model(folder / label), config)
        os.utime(path / "model.safetensors", ns=(10**18, 10**18))
        return path

    a, b = written("a", "a"), written("b", "moved")
    units = pymerge.find_permutations([a, b], batches(kind))
    expected = pymerge.merge(None, [read_model(a), read_model(b)], method="linear", align=units)
    moved = {"there": [a, b], "turned": [b, a], "copied": [written("c", "a"), written("d", "moved")]}
    for name, found in moved.items():
        pymerge.merge(None, found, method="linear", align=units, out=tmp_path / name)
        assert same(read_model(tmp_path / name), expected)
    with pytest.raises(InputError, match="which model is which of .* cannot be told: give them in this order"):
        pymerge.merge(None, [tmp_path / "d", a], method="linear", align=units, out=tmp_path / "out")


@pytest.mark.parametrize("models", ["bert"], indirect=True)
def test_a_zip_of_more_models_is_refused(models, tmp_path):
    kind, folder = models
    units = pymerge.find_permutations([folder / label for label in ("a", "moved", "b")], batches(kind), mode="zip")
    with pytest.raises(RecipeError, match="a zip is the mean of all its models"):
        merge(models, tmp_path / "out", align=units)


@pytest.mark.parametrize("models", ["bert"], indirect=True)
def test_other_shapes_and_other_numbers_of_models_are_refused(models, tmp_path):
    kind, folder = models
    tensors = [read_model(folder / label) for label in ("a", "moved")]
    spec = spec_for(floating_shapes(tensors[0]), json.loads((folder / "base" / "config.json").read_text()))
    units = pymerge.find_permutations(tensors, spec=spec)
    wider = [{name: torch.cat([t, t]) if "intermediate" in name else t for name, t in m.items()} for m in tensors]
    with pytest.raises(InputError, match="do not fit the model"):
        pymerge.merge(None, wider, method="linear", align=units)
    with pytest.raises(InputError, match="permutations are of 2 models, the recipe has 3"):
        pymerge.merge(None, [*tensors, dict(tensors[0])], method="linear", align=units)
    with pytest.raises(RecipeError, match="align: must be permutations"):
        pymerge.merge(None, tensors, method="linear", align=[1, 2])


@pytest.mark.parametrize("models", ["bert"], indirect=True)
def test_a_plan_shows_the_permutations_and_searches_for_none(models, tmp_path, monkeypatch, capsys):
    from pymerge.engine.describe import describe_plan, show_plan

    kind, folder = models
    labels = [{"model": str(folder / label), "parameters": {"weight": 1}} for label in ("a", "moved")]
    raw = {"models": labels, "merge_method": "linear"}
    units = pymerge.find_permutations([folder / "a", folder / "moved"])
    units.save(tmp_path / "perms.safetensors")
    monkeypatch.setattr("pymerge.align.api.find_permutations", None)
    options = pymerge.Options()
    for align, said in ((str(tmp_path / "perms.safetensors"), "units move"), (FIND, "found first")):
        plan = pymerge.plan_merge(Recipe.from_dict(raw | {"align": align}), options)
        assert describe_plan(plan, options)["align"]["recipe"] == align
        show_plan(plan, options)
        assert said in capsys.readouterr().out


@pytest.mark.parametrize("models", ["bert"], indirect=True)
def test_every_scale_of_a_search_is_a_merge_of_its_own(models):
    labels = [{"model": str(models[1] / label), "parameters": {"weight": 1}} for label in ("a", "moved")]
    raw = {"base_model": str(models[1] / "base"), "models": labels, "merge_method": "task_arithmetic"}
    assert why_merged_anew(Recipe.from_dict(raw)) == ""
    assert "in one order" in why_merged_anew(Recipe.from_dict(raw | {"align": FIND}))


@pytest.mark.parametrize("models", ["llama"], indirect=True)
def test_adapters_are_aligned_as_they_were_opened(models, tmp_path):
    """Over the base that the recipe says, whatever they name; samples run through whole models only."""
    kind, folder = models
    shapes = {"model.layers.1.mlp.up_proj.weight": (48, 32)}
    adapter = write_adapter(tmp_path / "adapter", random_factors(0, shapes), "gone")
    whole = {n: t.float() for n, t in adapted(read_model(folder / "moved"), random_factors(0, shapes)).items()}
    config = json.loads((folder / "base" / "config.json").read_text())
    write_model(tmp_path / "whole", whole, config)
    named = f"{folder / 'moved'}+{adapter}"
    expected, _ = merge(models, tmp_path / "expected", (folder / "a", tmp_path / "whole"), align=FIND)
    merged, summary = merge(models, tmp_path / "out", (folder / "a", named), align=FIND)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-5)
    assert summary["align"]["models"][0] == str(folder / "a")
    with pytest.raises(RecipeError, match="samples run through whole models"):
        merge(models, tmp_path / "refused", (folder / "a", named), align=search(models))
