"""Tiny models in their real layouts, as transformers, PEFT and tokenizers write them: the inputs of the parity run.

    python benchmarks/side_by_side/parity_models.py DIR     in an environment with transformers, tokenizers and PEFT

Each family is a base and models tuned from it (`llama/base`, `llama/a` ...): weights like trained ones, changes of a
third of that size, 30 % of the entries unchanged. The tokenizers are trained on the spot. Deterministic.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

VERSION = 1  # raise it when the files change
TEXT = ["the merged model knows what both models know", "to merge is to add what each task has changed"] * 4
WORDS = 96  # tokens of the tokenizer that all models of a family share, special ones included
SIZES = {"hidden_size": 48, "num_attention_heads": 4, "vocab_size": WORDS}
DECODER = SIZES | {"intermediate_size": 80, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": WORDS}
BERT = SIZES | {"num_hidden_layers": 2, "intermediate_size": 80, "max_position_embeddings": 64}
# folder -> (config class, its arguments, dtype, names of the tuned models, those written in shards)
FAMILIES: dict[str, tuple[str, dict[str, Any], str, tuple[str, ...], tuple[str, ...]]] = {
    "llama": ("LlamaConfig", DECODER | {"num_hidden_layers": 4}, "float32", ("a", "b", "c", "chat"), ("a",)),
    "llama16": ("LlamaConfig", DECODER | {"num_hidden_layers": 2}, "bfloat16", ("a", "b"), ("base", "b")),
    "mistral": ("MistralConfig", DECODER | {"num_hidden_layers": 2}, "bfloat16", ("a", "b"), ()),
    "qwen2": (
        "Qwen2Config",
        DECODER | {"num_hidden_layers": 3, "tie_word_embeddings": True},
        "float32",
        ("a", "b"),
        ("base", "a", "b"),
    ),
    "gpt2": ("GPT2Config", GPT2, "float32", ("a", "b"), ()),
    "bert": ("BertConfig", BERT, "float32", ("a", "b"), ()),
    "mixtral": (
        "MixtralConfig",
        DECODER | {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
        "float32",
        ("a", "b"),
        ("b",),
    ),
}
HEADS = {"BertConfig": "AutoModelForSequenceClassification"}
SHARD = "40KB"
# Models of the llama family whose vocabulary has tokens of their own, some in common, in another order.
VOCABULARIES = {"math": ["<plus>", "<sum>", "<pad>"], "code": ["<sum>", "<indent>"]}
CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


def tokenizer(added: list[str], template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """Byte-pair encoding of TEXT, with special tokens and those in `added` behind the words."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = sorted({letter for line in TEXT for letter in line.replace(" ", "\u0120")})
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=letters, show_progress=False
    )
    inner.train_from_iterator(TEXT, trainer)
    inner.add_tokens([f"<word{i}>" for i in range(WORDS - inner.get_vocab_size())])
    inner.add_tokens(added)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = template
    return made


def fill(model: torch.nn.Module, g: torch.Generator) -> None:
    """Matrices of standard deviation 0.05, norms around 1."""
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        p.data = (1 + 0.05 * noise if "norm" in name.lower() and p.dim() == 1 else 0.05 * noise).to(p.dtype)


def change(p: Tensor, g: torch.Generator) -> Tensor:
    noise = 0.015 * torch.randn(p.shape, generator=g) * (torch.rand(p.shape, generator=g) > 0.3)
    return (p.float() + noise).to(p.dtype)


def make_family(root: Path, name: str) -> None:
    config_class, arguments, dtype, tuned, sharded = FAMILIES[name]
    config = getattr(transformers, config_class)(**arguments, bos_token_id=1, eos_token_id=2)
    g = torch.Generator().manual_seed(sorted(FAMILIES).index(name))
    head = getattr(transformers, HEADS.get(config_class, "AutoModelForCausalLM"))
    model = head.from_config(config, dtype=getattr(torch, dtype)).eval()
    fill(model, g)
    start = {key: p.data.clone() for key, p in model.named_parameters()}
    for one in ("base", *tuned):
        for key, p in model.named_parameters():
            p.data = start[key] if one == "base" else change(start[key], g)
        shards = {"max_shard_size": SHARD} if one in sharded else {}
        model.save_pretrained(root / name / one, **shards)
        tokenizer([], CHAT if one == "chat" else None).save_pretrained(str(root / name / one))
    if name == "llama":
        make_relatives(root, model, start, g)


def make_relatives(root: Path, model: Any, start: dict[str, Tensor], g: torch.Generator) -> None:
    """Adapters of the family's base, then models of other vocabularies."""
    import peft

    for one, seed in (("lora-a", 1), ("lora-b", 2)):
        for key, p in model.named_parameters():
            p.data = start[key].clone()
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
        adapted = peft.get_peft_model(model, config)
        adapted.peft_config["default"].base_model_name_or_path = "llama/base"
        adapted.save_pretrained(root / "llama" / one)
        model = adapted.unload()
    for one, added in VOCABULARIES.items():
        for key, p in model.named_parameters():
            p.data = change(start[key], g)
        words = tokenizer(added)
        model.resize_token_embeddings(len(words), mean_resizing=False)
        fresh = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
        for weight in fresh:
            weight.data[WORDS:] = 0.05 * torch.randn(len(added), weight.shape[1], generator=g)
        model.save_pretrained(root / "llama" / one)
        words.save_pretrained(root / "llama" / one)
        model.resize_token_embeddings(WORDS)


def make(root: Path) -> None:
    """Every family, unless it is there already."""
    mark = root / "made.json"
    made = {"version": VERSION, "transformers": transformers.__version__}
    if mark.is_file() and json.loads(mark.read_text()) == made:
        return
    for name in FAMILIES:
        make_family(root, name)
    mark.write_text(json.dumps(made))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
