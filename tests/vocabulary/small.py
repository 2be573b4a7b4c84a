"""Small models with tokenizers of their own, trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from tests.models import write_model

TEXTS = {
    "plain": ["the quick brown fox jumps over the lazy dog", "a cat sat on the mat and the dog sat too"] * 4,
    "code": ["def f(x): return x + 1", "for i in range(10): print(i)", "import os, sys; return None"] * 4,
    "other": ["der schnelle braune Fuchs springt", "die Katze sass auf der Matte und der Hund auch"] * 4,
}
WIDTH = 8


def byte_level(text: str, size: int, special: Sequence[str] = ("<s>", "</s>"), added: Sequence[Any] = ()) -> Any:
    """A byte-level BPE tokenizer with at most `size` tokens before those added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS[text], trainer)
    names = dict(zip(("bos_token", "eos_token"), special, strict=False))
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.add_tokens(list(added))
    return made


def word_piece(text: str, size: int) -> Any:
    """A BERT tokenizer."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        TEXTS[text], trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def unigram(text: str, size: int) -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS[text], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def llama(folder: Path, tokenizer: Any, seed: int, *, rows: int | None = None, tied: bool = False) -> Path:
    """A Llama of 2 layers with random weights; rows: of its embedding, where not one a token."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=rows or len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bare(folder: Path, tokenizer: Any, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """Any tensors with a tokenizer beside them."""
    write_model(folder, tensors, dict(config))
    tokenizer.save_pretrained(folder)
    return folder


def vocabulary(folder: Path) -> dict[str, int]:
    return transformers.AutoTokenizer.from_pretrained(folder).get_vocab()


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())
