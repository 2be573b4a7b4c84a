"""`pymerge verify`: what was changed since the merge, what does not fit the config, what another recipe makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

import pymerge
from pymerge.engine.adapter_out import merge_to_adapter
from pymerge.engine.verify import load_with_its_library, loader_of
from pymerge.errors import CorruptFile, InputError
from tests.models import family, random_tensors, read_model, write_model

SHAPES = {
    "model.embed_tokens.weight": (64, 32),
    **{f"model.layers.{i}.mlp.up_proj.weight": (48, 32) for i in range(2)},
    "lm_head.weight": (64, 32),
}
CONFIG = {"vocab_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": False}


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A recipe of a base and two models."""
    base, children = family(tmp_path, 2, SHAPES)
    for folder in (base, *children):
        (folder / "config.json").write_text(json.dumps(CONFIG))
    models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in children]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"merge_method": "task_arithmetic", "base_model": str(base), "models": models}))
    return path


@pytest.fixture
def merged(recipe, tmp_path) -> Path:
    pymerge.Recipe.from_yaml(recipe).run(tmp_path / "out")
    return tmp_path / "out"


def refused(folder: Path, kind=CorruptFile, **options) -> str:
    with pytest.raises(kind) as error:
        pymerge.verify(folder, **options)
    return str(error.value)


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_merge_is_what_its_recipe_makes(merged, recipe):
    assert pymerge.verify(merged, against=recipe) == {"tensors": 4, "bytes": 4 * (2 * 64 + 2 * 48) * 32}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 72}, "model.embed_tokens.weight: 64 rows, config.json says vocab_size 72"),
        ({"num_hidden_layers": 3}, "model.layers: 2 layers, config.json says 3"),
        ({"num_hidden_layers": 1}, "model.layers: 2 layers, config.json says 1"),
        ({"tie_word_embeddings": True}, "lm_head.weight: config.json ties it to model.embed_tokens.weight"),
    ],
)
def test_a_config_that_does_not_fit_the_weights(merged, change, said):
    change_config(merged, **change)
    assert said in refused(merged)


@pytest.mark.parametrize(
    ("stack", "layers", "config"),
    [
        ("albert.encoder.albert_layer_groups", 1, {"num_hidden_layers": 12, "num_hidden_groups": 1}),
        ("model.layers", 3, {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}),  # as DeepSeek-V3 is stored
        ("model.layers", 2, {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}),  # as transformers saves it
        ("model.language_model.layers", 3, {"text_config": {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}}),
    ],
)
def test_layers_that_are_shared_or_predict_ahead_are_no_fault(stack, layers, config, tmp_path):
    base, (child,) = family(tmp_path, 1, {f"{stack}.{i}.up.weight": (8, 4) for i in range(layers)})
    for folder in (base, child):
        (folder / "config.json").write_text(json.dumps(config))
    pymerge.merge(base, [child], method="task_arithmetic", scale=1.0, out=tmp_path / "out")
    assert pymerge.verify(tmp_path / "out")["tensors"] == layers
    inner = {key: value + 2 for key, value in config.get("text_config", config).items()}
    change_config(tmp_path / "out", **({"text_config": inner} if "text_config" in config else inner))
    assert f"{stack}: {layers} layers" in refused(tmp_path / "out")


def test_a_recipe_of_pickled_models(recipe, tmp_path):
    torch.save(read_model(tmp_path / "tuned0"), tmp_path / "tuned0/pytorch_model.bin")
    (tmp_path / "tuned0/model.safetensors").unlink()
    options = pymerge.Options(allow_pickle=True)
    pymerge.Recipe.from_yaml(recipe).run(tmp_path / "out", options)
    assert "--allow-pickle" in refused(tmp_path / "out", InputError, against=recipe)
    assert pymerge.verify(tmp_path / "out", against=recipe, options=options)["tensors"] == 4


def test_an_adapter_cannot_be_verified(recipe, tmp_path):
    merge_to_adapter(pymerge.Recipe.from_yaml(recipe), tmp_path / "adapter", 4)
    assert "no checksums: only whole models" in refused(tmp_path / "adapter", InputError)


def test_another_recipe_is_told_from_this_one(merged, recipe):
    other = yaml.safe_load(recipe.read_text()) | {"parameters": {"lambda": 0.5}}
    other["models"][0]["parameters"]["weight"] = 0.25
    text = refused(merged, InputError, against=pymerge.Recipe.from_dict(other))
    assert (
        "recipe.parameters" in text
        and "0.5" in text
        and "recipe.models[0].parameters.weight: was 1.0, is now 0.25" in text
    )


def test_inputs_that_were_written_since(merged, recipe, tmp_path):
    write_model(tmp_path / "tuned0", random_tensors(5, SHAPES), CONFIG)
    said = refused(merged, InputError, against=recipe)
    assert f"{tmp_path / 'tuned0'}: model.safetensors has changed (time of change" in said and "inputs[" not in said


def test_names_shapes_and_dtypes_of_the_recipe(merged, recipe):
    tensors = read_model(merged)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 16)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
    tensors["more"] = torch.zeros(3)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    summary = (merged / "merge.json").read_text()
    write_model(merged, tensors, CONFIG)
    (merged / "merge.json").write_text(summary)
    text = refused(merged, InputError, against=recipe)
    assert "model.layers.0.mlp.up_proj.weight: F32 [48, 16], the recipe makes F32 [48, 32]" in text
    assert "lm_head.weight: BF16 [64, 32], the recipe makes F32 [64, 32]" in text
    assert "model.layers.1.mlp.up_proj.weight: missing" in text and "more: not of this recipe" in text


def test_what_transformers_would_not_load(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64)
    for name in ("base", "tuned"):
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    out = tmp_path / "out"
    pymerge.merge(tmp_path / "base", [tmp_path / "tuned"], method="task_arithmetic", scale=0.5, out=out)
    pymerge.verify(out, load=True)
    change_config(out, intermediate_size=40)
    text = refused(out, load=True)
    assert "LlamaForCausalLM" in text and "in another shape" in text and "mlp.up_proj.weight" in text
    change_config(out, intermediate_size=48, attention_bias=True)
    assert "lacks" in refused(out, load=True)


def test_loading_without_accelerate_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr("pymerge.engine.verify.find_spec", lambda name: None)
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="loading needs accelerate: pip install accelerate"):
        load_with_its_library(tmp_path)


def test_a_component_is_loaded_by_its_own_class(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert loader_of(tmp_path) == ("diffusers", "UNet2DConditionModel")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert loader_of(tmp_path) == ("transformers", "")
