"""Shapes of models without weights: published counts, names, and what is refused."""

import json

import pytest

from pymerge.checkpoint.shapes import ARCHITECTURES, PUBLISHED, shape_models
from pymerge.errors import InputError

# Exactly what the configs give. Published: 8.03e9, 70.6e9, 405.9e9, 140.6e9, and 671e9 without the layers for
# multi-token prediction.
COUNTS = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "mixtral-8x22b": 140_620_634_112,
    "deepseek-v3": 671_026_419_200,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    (model,) = shape_models(PUBLISHED[name], 1)
    assert sum(tensor.numel for tensor in model.values()) == COUNTS[name]
    assert model.nbytes == 2 * COUNTS[name]


def small(kind: str) -> dict:
    """A config of a few thousand parameters."""
    shrunk = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4}
    shrunk |= {"num_key_value_heads": 2, "vocab_size": 32, "num_local_experts": 4, "n_routed_experts": 4}
    shrunk |= {"moe_intermediate_size": 6, "first_k_dense_replace": 1, "q_lora_rank": 4, "kv_lora_rank": 4}
    shrunk |= {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4, "n_shared_experts": 1}
    shrunk |= {"head_dim": 2, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    return shrunk | {"model_type": kind}


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_names_and_shapes_are_those_of_the_library(kind):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**small(kind), tie_word_embeddings=False)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config).state_dict()
    (ours,) = shape_models(small(kind), 1)
    assert {name: t.shape for name, t in ours.items()} == {name: tuple(t.shape) for name, t in theirs.items()}


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_mixtures_have_as_many_parameters_as_the_library_s(kind):
    """The library holds all experts of a layer in one tensor; files have one each."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {key: value for key, value in small(kind).items() if kind == "deepseek_v3" or key != "head_dim"}
    if kind == "deepseek_v3":
        given["head_dim"] = given["qk_rope_head_dim"]
    config = AutoConfig.for_model(**given, tie_word_embeddings=False)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config).state_dict()
    (ours,) = shape_models(given, 1)
    assert sum(t.numel for t in ours.values()) == sum(t.numel() for t in theirs.values())


def test_tied_embeddings_have_no_head():
    (model,) = shape_models(small("llama") | {"tie_word_embeddings": True}, 1)
    assert "lm_head.weight" not in model


def test_models_share_tensors_and_the_base_has_its_own():
    base, one, other = shape_models(small("llama"), 3)
    name = "model.norm.weight"
    assert one[name] is other[name] is not base[name]


def test_values_are_never_made_up():
    (model,) = shape_models(small("llama"), 1)
    with pytest.raises(InputError, match=r"model\.norm\.weight: only its shape is known"):
        model["model.norm.weight"].read_into(memoryview(bytearray(2)))


def test_unknown_architectures_and_missing_values_are_refused():
    with pytest.raises(InputError, match=", ".join(ARCHITECTURES) + ", the config's is 'bert'"):
        shape_models(small("bert"), 1)
    lacking = {key: value for key, value in small("llama").items() if key != "intermediate_size"}
    with pytest.raises(InputError, match="lacks 'intermediate_size'"):
        shape_models(json.loads(json.dumps(lacking)), 1)
