"""Recipes with slices and modules against mergekit 0.1.5 itself, tensor by tensor."""

import json

import pytest
import torch

pytest.importorskip("mergekit", reason="mergekit is not installed: make test-mergekit")

import transformers
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge

from pymerge.engine.local import merge_to_disk
from pymerge.recipe import Recipe
from tests.models import read_model

SIZES = {"vocab_size": 48, "hidden_size": 32, "num_attention_heads": 4}
WIDE = {"intermediate_size": 48} | SIZES
GROUPED = {"num_key_value_heads": 2} | WIDE
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"num_hidden_layers": 6} | GROUPED),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_hidden_layers": 6, "num_local_experts": 3} | GROUPED),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_layer": 4, "n_embd": 32, "n_head": 4, "vocab_size": 48}),
    "bert": ("BertForSequenceClassification", "BertConfig", {"num_hidden_layers": 4} | WIDE),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"num_layers": 3, "num_decoder_layers": 4, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4}
        | {"feed_forward_proj": "gated-gelu", "vocab_size": 48},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {"encoder_layers": 3, "decoder_layers": 4, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 48},
    ),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A function: kind -> the folders of three models of it."""
    root = tmp_path_factory.mktemp("models")

    def models(kind):
        name, config, sizes = MODELS[kind]
        for i in range(3):
            if not (root / f"{kind}{i}").exists():
                torch.manual_seed(i)
                model = getattr(transformers, name)(getattr(transformers, config)(**sizes))
                with torch.no_grad():
                    for p in model.parameters():
                        p += 0.05 * torch.randn(p.shape)
                model.save_pretrained(root / f"{kind}{i}")
        return root

    return models


FRANKEN = """
slices:
  - sources: [{model: A, layer_range: [0, 4]}]
  - sources: [{model: B, layer_range: [2, 6]}]
merge_method: passthrough
"""
REPEATED = """
slices:
  - sources: [{model: A, layer_range: [0, 3]}]
  - sources:
      - model: A
        layer_range: [1, 3]
        parameters: {scale: [{filter: o_proj, value: 0}, {filter: down_proj, value: 0.5}, {value: 1}]}
  - sources: [{model: A, layer_range: [1, 4]}]
    parameters: {scale: [1, 2]}
merge_method: passthrough
"""
LINEAR = """
slices:
  - sources:
      - {model: A, layer_range: [0, 3], parameters: {weight: [0, 1]}}
      - {model: B, layer_range: [1, 4], parameters: {weight: [{filter: mlp, value: 0.7}]}}
    parameters: {weight: 0.4}
  - sources:
      - {model: B, layer_range: [3, 4], parameters: {weight: [0.1, 0.9]}}
      - model: C
        layer_range: [0, 1]
        parameters: {weight: [{filter: layers.0.self, value: 2}, {filter: h.0.attn, value: 2}]}
merge_method: linear
parameters: {weight: [{filter: norm, value: 0.8}, {filter: ln_, value: 0.8}, {value: 0.3}]}
"""
SLERP = """
slices:
  - sources: [{model: A, layer_range: [0, 2]}, {model: B, layer_range: [2, 4]}]
    parameters: {t: [{filter: self_attn, value: [0, 0.5, 1]}, {filter: attention, value: [0, 1]}, {value: 0.5}]}
  - sources: [{model: A, layer_range: [1, 4]}, {model: B, layer_range: [0, 3]}]
merge_method: slerp
base_model: A
parameters: {t: [{filter: layers.3.mlp, value: 0.9}, {filter: layer.3.output, value: 0.9}, {value: [0.2, 0.8]}]}
"""
TIES = """
slices:
  - sources:
      - {model: A, layer_range: [0, 2]}
      - {model: B, layer_range: [0, 2], parameters: {weight: 0.5, density: [0.3, 0.9]}}
      - {model: C, layer_range: [2, 4], parameters: {weight: [{filter: mlp, value: 0.2}, {value: 1.1}]}}
    parameters: {lambda: [0.5, 1.5]}
  - sources:
      - {model: A, layer_range: [2, 4]}
      - {model: B, layer_range: [2, 4]}
      - {model: C, layer_range: [1, 3]}
    parameters: {normalize: false}
merge_method: ties
base_model: A
parameters: {weight: 0.6, density: 0.5, lambda: 0.8}
"""
BASES = """
slices:
  - sources: [{model: A, layer_range: [0, 2]}, {model: B, layer_range: [0, 2]}]
    base_model: B
  - sources: [{model: A, layer_range: [2, 4]}, {model: C, layer_range: [1, 3]}]
merge_method: task_arithmetic
base_model: A
parameters: {weight: [{filter: bias, value: 0.1}, {value: 0.7}]}
"""
DEFAULT = """
modules:
  default:
    slices:
      - sources: [{model: A, layer_range: [0, 2]}, {model: B, layer_range: [1, 3]}]
        parameters: {weight: [{filter: mlp, value: 0.9}]}
    parameters: {weight: [0.2, 0.6]}
merge_method: linear
parameters: {weight: 5}
"""
CODERS = """
modules:
  encoder:
    slices:
      - sources: [{model: A, layer_range: [0, 2]}, {model: B, layer_range: [0, 2]}]
      - sources: [{model: A, layer_range: [1, 3]}, {model: B, layer_range: [1, 3]}]
    parameters: {weight: [0.2, 0.6]}
  decoder:
    models: [{model: A, parameters: {weight: [1, 0]}}, {model: B, parameters: {weight: [0, 1]}}]
  shared:
    models: [{model: A}, {model: B}]
merge_method: linear
parameters: {weight: 0.5}
"""
STACKS = """
modules:
  model.encoder.layers:
    slices:
      - sources: [{model: A, layer_range: [0, 2]}, {model: B, layer_range: [1, 3]}]
  model.decoder.layers:
    models: [{model: A}, {model: B, parameters: {weight: [0, 1]}}]
  default:
    models: [{model: A}, {model: B}]
merge_method: linear
parameters: {weight: 0.5}
"""
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
CASES = {
    "franken-llama": ("llama", FRANKEN, 8),
    "repeated-llama": ("llama", REPEATED, 8),
    "repeated-gpt2": ("gpt2", REPEATED, 8),
    "repeated-bert": ("bert", REPEATED, 8),
    "linear-llama": ("llama", LINEAR, 4),
    "linear-gpt2": ("gpt2", LINEAR, 4),
    "slerp-llama": ("llama", SLERP, 5),
    "slerp-bert": ("bert", SLERP, 5),
    "ties-llama": ("llama", TIES, 4),
    "ties-gpt2": ("gpt2", TIES, 4),
    "bases-llama": ("llama", BASES, 4),
    "bases-bert": ("bert", BASES, 4),
    "default-llama": ("llama", DEFAULT, 2),
    "coders-t5": ("t5", CODERS, 4),
    "stacks-bart": ("bart", STACKS, 2),
    "franken-mixtral": ("mixtral", FRANKEN, 8),
}


def spelled(text, kind, root):
    """The YAML with the models' folders in place of A, B and C."""

    def walk(value):
        if isinstance(value, dict):
            return {
                k: str(root / f"{kind}{'ABC'.index(v)}") if k in ("model", "base_model") else walk(v)
                for k, v in value.items()
            }
        return [walk(v) for v in value] if isinstance(value, list) else value

    return walk(yaml.safe_load(text)) | {"dtype": "float32"}


def loaded(kind, folder):
    """The model as transformers sees it; nothing may be missing or left over."""
    cls = getattr(transformers, MODELS[kind][0])
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


@pytest.mark.parametrize("case", CASES)
def test_same_tensors_as_mergekit(case, folder, tmp_path):
    kind, text, layers = CASES[case]
    raw = spelled(text, kind, folder(kind))
    run_merge(MergeConfiguration.model_validate(raw), str(tmp_path / "theirs"), MergeOptions(quiet=True))
    merge_to_disk(Recipe.from_dict(raw), tmp_path / "ours")
    model = loaded(kind, tmp_path / "ours")
    if kind == "mixtral":  # mergekit stores all experts of a layer as one tensor, as transformers 5 holds them
        theirs, ours = loaded(kind, tmp_path / "theirs").state_dict(), model.state_dict()
    else:
        theirs, ours = read_model(tmp_path / "theirs"), read_model(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
    config, their_config = (json.loads((tmp_path / of / "config.json").read_text()) for of in ("ours", "theirs"))
    found = {key: config[key] for key in COUNTS if key in config}
    assert layers in found.values()
    if kind != "bart":  # of stacks that mergekit has no description of, it leaves the old numbers
        assert found == {key: their_config[key] for key in found}
