"""Tiny mixtures of experts of transformers, saved with a tensor for each expert and with one for all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pymerge.checkpoint import open_checkpoint

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT = {
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 12,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
# The number of experts has two digits: they are told apart by number, not by the alphabet.
CONFIGS = {
    "MixtralConfig": {"intermediate_size": 48, "num_local_experts": 12},
    "PhimoeConfig": {"intermediate_size": 24, "num_local_experts": 12},
    "Qwen2MoeConfig": {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "num_experts": 12},
    "Qwen3MoeConfig": {"moe_intermediate_size": 24, "num_experts": 12, "head_dim": 8},
    "DeepseekV2Config": LATENT,
    "DeepseekV3Config": LATENT,
    "OlmoeConfig": {"intermediate_size": 16, "num_experts": 12},  # gate and up together are square
    "GraniteMoeConfig": {"intermediate_size": 24, "num_local_experts": 4},
    "JambaConfig": {
        "intermediate_size": 24,
        "num_experts": 4,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
}
ONE_LAYOUT = {
    "GptOssConfig": {"intermediate_size": 24, "num_local_experts": 4, "head_dim": 8},
    "Llama4TextConfig": {"intermediate_size": 24, "intermediate_size_mlp": 40, "num_local_experts": 4, "head_dim": 8},
}


def made(name: str, seed: int = 0) -> Any:
    """A causal language model of random bfloat16 weights, 2 layers."""
    import transformers

    config = getattr(transformers, name)(**SMALL | {**CONFIGS, **ONE_LAYOUT}[name])
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():  # some modules leave parameters as they find them
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    return model


def save_both(model: Any, folder: Path) -> dict[str, Path]:
    """Folders of the same weights in both layouts."""
    places = {"each": folder / "each", "fused": folder / "fused"}
    model.save_pretrained(places["each"], max_shard_size="30KB")
    model.save_pretrained(places["fused"], save_original_format=False)
    return places


def values_of(folder: Path) -> dict[str, torch.Tensor]:
    """What a folder holds, as pymerge reads it."""
    with open_checkpoint(folder) as model:
        return {name: model[name].load().clone() for name in model}


def loaded(folder: Path) -> Any:
    """As transformers has it; nothing missing, nothing left over."""
    import transformers

    found: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    model, info = found
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


def equal(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
