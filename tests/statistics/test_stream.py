"""Weights that come and go give the moments of the model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from pymerge.errors import InputError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def saved(folder: Path, model: Any, dtype: torch.dtype) -> Path:
    model.to(dtype).save_pretrained(folder)
    return folder


def make(name: str, folder: Path, dtype: torch.dtype) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (4, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if name == "llama":
        config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=50, tie_word_embeddings=True)
        return saved(folder, transformers.LlamaForCausalLM(config), dtype), batch
    if name == "bert":
        config = transformers.BertConfig(**SMALL, vocab_size=50)
        return saved(folder, transformers.BertForSequenceClassification(config), dtype), batch
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
        return saved(folder, transformers.GPT2LMHeadModel(config), dtype), batch
    config = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4)
    return saved(folder, transformers.ViTForImageClassification(config), dtype), {
        "pixel_values": torch.randn(3, 3, 8, 8).to(dtype)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "vit"])
def test_streamed_moments_are_those_in_memory(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    folder, batch = make(name, tmp_path / "model", dtype)
    in_memory = pymerge.observe(folder, [batch])
    streamed = pymerge.observe(folder, [batch], stream_to=tmp_path / "x.stats.safetensors")
    assert streamed.header == in_memory.header and len(streamed.modules) >= 8
    with pymerge.open_checkpoint(folder) as checkpoint:
        assert all(f"{module}.weight" in checkpoint for module in streamed.modules)
    for module in streamed.modules:
        expected = in_memory[module].second_moment()
        torch.testing.assert_close(streamed[module].second_moment(), expected, rtol=1e-5, atol=1e-7)
        assert streamed[module].rows == in_memory[module].rows
    streamed.close()


def test_heads_never_run_and_weights_are_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, batch = make("llama", tmp_path / "model", torch.float32)
    from pymerge.checkpoint import Checkpoint
    from pymerge.statistics import stream

    made, read = [], []
    empty_model, getitem = stream.empty_model, Checkpoint.__getitem__
    monkeypatch.setattr(stream, "empty_model", lambda *a: made.append(empty_model(*a)) or made[-1])
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda self, name: read.append(name) or getitem(self, name))
    pymerge.observe(folder, [batch], stream_to=tmp_path / "x.stats.safetensors").close()
    assert all(parameter.is_meta for parameter in made[0].parameters())
    assert "model.norm.weight" not in read and read.count("model.embed_tokens.weight") == 1


def test_what_cannot_be_streamed_says_so(tmp_path: Path) -> None:
    folder, batch = make("bert", tmp_path / "model", torch.float32)
    out = tmp_path / "x.stats.safetensors"
    with pytest.raises(InputError, match="must be one batch, got more"):
        pymerge.observe(folder, [batch, batch], stream_to=out)
    with pytest.raises(InputError, match="in memory already"):
        pymerge.observe(torch.nn.Linear(2, 2), [batch], stream_to=out)
    assert not list(tmp_path.glob("x.*"))
