"""Small random transformers models on disk, and their outputs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pymerge.align.groups import Spec
from pymerge.align.permutations import Permutations
from pymerge.align.random_permutations import random_permutations

COMMON = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
MHA = COMMON | {"num_attention_heads": 4}
GQA = MHA | {"num_key_value_heads": 2}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32}
# Name -> (class, config). Every family is here, and every head on top that its spec knows.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", GQA),
    "llama-mha-bias": ("LlamaForCausalLM", MHA | {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaForCausalLM", GQA | {"tie_word_embeddings": True}),
    "llama-classifier": ("LlamaForSequenceClassification", GQA | {"pad_token_id": 0}),
    "mistral": ("MistralForCausalLM", GQA | {"head_dim": 16}),
    "qwen2": ("Qwen2ForCausalLM", GQA),
    "qwen3": ("Qwen3ForCausalLM", GQA | {"head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", GQA | {"head_dim": 16}),
    "mixtral": ("MixtralForCausalLM", GQA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": ("Olmo2ForCausalLM", GQA),
    "opt": ("OPTForCausalLM", MHA | OPT),
    "phi": ("PhiForCausalLM", MHA),
    "starcoder2": ("Starcoder2ForCausalLM", GQA),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "gpt_neox": ("GPTNeoXForCausalLM", MHA | {"rotary_pct": 0.5}),
    "bert": ("BertForPreTraining", MHA),
    "bert-untied": ("BertForMaskedLM", MHA | {"tie_word_embeddings": False}),
    "bert-classifier": ("BertForSequenceClassification", MHA),
    "bert-tokens": ("BertForTokenClassification", MHA),
    "bert-base": ("BertModel", MHA),
    "llama-base": ("LlamaModel", GQA),
    "roberta": ("RobertaForMaskedLM", MHA | {"pad_token_id": 0}),
    "roberta-classifier": ("RobertaForSequenceClassification", MHA | {"pad_token_id": 0}),
}


@contextmanager
def all_in_float64() -> Iterator[None]:
    """Norms and softmax, which transformers computes in float32 whatever the model's dtype, in float64 too."""
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def wide(x: Any, *args: Any, **kwargs: Any) -> Any:
        return to(x, *(torch.float64 if a is torch.float32 else a for a in args), **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", wide)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))
        yield


class Tiny:
    """A model in a folder: its tensors and config as stored, and what it computes with others in their place."""

    def __init__(self, described: tuple[str, dict[str, Any]], folder: Path, dtype: torch.dtype) -> None:
        import transformers

        self.cls_name, kwargs = described
        self.cls = getattr(transformers, self.cls_name)
        self.dtype, self.folder = dtype, folder
        torch.manual_seed(0)
        config = self.cls.config_class(**kwargs)
        if self.cls_name.endswith("Classification"):
            config.num_labels = 3
        model = self.cls(config).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():  # biases and scales too, so that none is the same for all units
                parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(folder)
        self.tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
        self.config = json.loads((folder / "config.json").read_text())
        self.shapes = {n: tuple(t.shape) for n, t in self.tensors.items() if t.is_floating_point()}

    @cached_property
    def before(self) -> Tensor:
        return self.output(self.tensors)

    def output(self, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """All floating outputs of the class with these tensors, as one vector."""
        if tensors is not None:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, self.folder / "model.safetensors", metadata={"format": "pt"})
        options = {"dtype": self.dtype, "attn_implementation": "eager", "experts_implementation": "eager"}
        model: nn.Module = self.cls.from_pretrained(self.folder, **options).eval()
        ids = torch.randint(1, 40, (3, 9), generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            found = model(input_ids=ids)
        return torch.cat([v.flatten() for v in found.values() if isinstance(v, Tensor) and v.is_floating_point()])

    def aligned(self, permutations: Permutations) -> dict[str, Tensor]:
        """The tensors with model 1's units moved."""
        return {
            name: permutations.aligned(name, self.tensors[permutations.source(name, 1)], 1) for name in self.tensors
        }

    def change(self, permutations: Permutations) -> float:
        """Largest change of an output, relative to the largest output, when model 1's units move."""
        after = self.output(self.aligned(permutations))
        return float((after - self.before).abs().max() / self.before.abs().max())


def scrambled(spec: Spec) -> Permutations:
    """Random permutations under which something moves in every view of every group that may move at all."""
    for seed in count():
        permutations = random_permutations(spec, ("a", "b"), torch.Generator().manual_seed(seed))
        views = [rows for group in permutations.index.values() for rows in group.values()]
        if not any(torch.equal(rows[0], rows[1]) for rows in views):
            return permutations
    raise AssertionError
