"""The tables of Llama and BERT hold for architectures that have their names; of others they say what is left."""

import pytest
import torch

from pymerge.align.specs import spec_for
from pymerge.errors import InputError
from tests.align.tiny import GQA, MHA, Tiny, scrambled

pytest.importorskip("transformers")

WIDE = GQA | {"head_dim": 16}
EXPERTS = GQA | {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1, "num_experts": 4}
RELATIVES = {
    "gemma": ("GemmaForCausalLM", WIDE),
    "gemma3_text": ("Gemma3ForCausalLM", WIDE),
    "qwen2_moe": ("Qwen2MoeForCausalLM", EXPERTS | {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", EXPERTS | {"head_dim": 16}),
    "olmoe": ("OlmoeForCausalLM", EXPERTS),
    "olmo3": ("Olmo3ForCausalLM", GQA),
    "granite": ("GraniteForCausalLM", GQA),
    "smollm3": ("SmolLM3ForCausalLM", GQA | {"pad_token_id": 0}),
    "stablelm": ("StableLmForCausalLM", GQA),
    "cohere": ("CohereForCausalLM", GQA),
    "cohere2": ("Cohere2ForCausalLM", GQA),
    "seed_oss": ("SeedOssForCausalLM", WIDE),
    "xlm-roberta": ("XLMRobertaForMaskedLM", MHA),
    "camembert": ("CamembertForMaskedLM", MHA),
}
OTHERS = {
    "phi3": (
        ("Phi3ForCausalLM", GQA | {"pad_token_id": 0}),
        r"layers\.0\.mlp\.gate_up_proj\.weight \[96, 32\]: in no group",
    ),
    "glm": (
        ("GlmForCausalLM", GQA | {"head_dim": 8, "pad_token_id": 0}),
        r"mlp\.gate_up_proj\.weight \[96, 32\]: in no",
    ),
    "gpt_oss": (
        ("GptOssForCausalLM", WIDE | {"num_local_experts": 4}),
        r"layers\.0\.self_attn\.sinks \[4\]: in no group",
    ),
    "cohere": (("CohereForCausalLM", GQA | {"use_qk_norm": True}), r"k_norm\.weight \[2, 8\]: in no group"),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_any_allowed_permutation_preserves_the_function(name, tmp_path):
    model = Tiny(RELATIVES[name], tmp_path, torch.float32)
    assert model.config["model_type"] == name
    assert model.change(scrambled(spec_for(model.shapes, model.config))) < 1e-5


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_left_is_listed(name, tmp_path):
    described, message = OTHERS[name]
    model = Tiny(described, tmp_path, torch.float32)
    with pytest.raises(InputError, match=message):
        spec_for(model.shapes, model.config, "decoder")
