"""Tiny transformers models with fine-tuned children on disk, and samples for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = 50


def built(kind: str) -> Any:
    if kind == "llama":
        config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=WORDS, tie_word_embeddings=True)
        return transformers.LlamaForCausalLM(config)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=WORDS, n_positions=16)
        return transformers.GPT2LMHeadModel(config)
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, vocab_size=WORDS))
    if kind == "albert":  # one layer, run twice
        config = transformers.AlbertConfig(**SMALL, vocab_size=WORDS, embedding_size=16)
        return transformers.AlbertForSequenceClassification(config)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=8, patch_size=4))


def children(folder: Path, kind: str, tasks: int = 2) -> tuple[Path, list[Path]]:
    """A base and its children; random weights."""
    torch.manual_seed(0)
    model = built(kind)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.save_pretrained(folder / "base")
    paths = []
    for task in range(tasks):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(base[name] + 0.02 * torch.randn(parameter.shape))
        paths.append(folder / f"task{task}")
        model.save_pretrained(paths[-1])
    return folder / "base", paths


def batch_for(kind: str, task: int, rows: int = 4) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(task + 1)
    if kind == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=g)}
    ids = torch.randint(1, WORDS, (rows, 9), generator=g)
    mask = torch.ones_like(ids)
    mask[1, 5 + task :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def add_tokenizer(folder: Path) -> None:
    """A word-level one: w1, w2, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0} | {f"w{i}": i for i in range(1, WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    made.save_pretrained(folder)


def write_texts(path: Path, task: int, samples: int = 5) -> Path:
    g = torch.Generator().manual_seed(task)
    texts = [" ".join(f"w{i}" for i in torch.randint(1, WORDS, (5 + s,), generator=g)) for s in range(samples)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def loaded(path: Path) -> Any:
    return type(built(json.loads((path / "config.json").read_text())["model_type"])).from_pretrained(path).eval()
