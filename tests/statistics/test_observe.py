"""Observed moments against rows that are caught by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pymerge.errors import InputError, NonFinite
from pymerge.statistics import observe, open_statistics


class Block(nn.Module):
    """Three layers on one input, one on another, as attention has them."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.down = nn.Linear(width, 5)
        self.lm_head = nn.Linear(5, 7)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.lm_head(self.down(torch.tanh(self.q(hidden) + self.k(hidden) * self.v(hidden))))


def batches(count: int, rows: int = 4, width: int = 12) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(2, rows, dtype=torch.long)
    mask[1, rows // 2 :] = 0
    return [{"hidden": torch.randn(2, rows, width, generator=g), "attention_mask": mask} for _ in range(count)]


def rows_seen(data: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([batch["hidden"][batch["attention_mask"].bool()] for batch in data])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_moments_are_those_of_the_rows_without_padding(count: int, dtype: str) -> None:
    model, data = Block(), batches(count)
    found = observe(model, data, dtype=dtype)  # type: ignore[arg-type]
    x = rows_seen(data).double()
    assert found["q"].rows == len(x) and (found["q"].samples is not None) == (len(x) <= 9 / 16 * 12)
    torch.testing.assert_close(found["q"].second_moment(), x.mT @ x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["q"].mean.double(), x.mean(0), rtol=1e-6, atol=1e-6)
    inner = torch.tanh(model.q(x.float()) + model.k(x.float()) * model.v(x.float())).double()
    torch.testing.assert_close(found["down"].second_moment(), inner.mT @ inner, rtol=1e-5, atol=1e-5)


def test_layers_with_one_input_share_moments_and_heads_are_left_out() -> None:
    found = observe(Block(), batches(2))
    assert found.header.modules == {"q": "q", "k": "q", "v": "q", "down": "down"}
    assert found["k"] is found["q"]
    only = observe(Block(), batches(2), targets=["d*", "lm_head"], exclude=())
    assert only.modules == ("down", "lm_head")


def test_a_file_gives_back_what_was_saved(tmp_path) -> None:
    data = batches(3)
    for count in (1, 3):  # rows, and a triangle
        found = observe(Block(), data[:count])
        found.save(tmp_path / "x.stats.safetensors")
        read = open_statistics(tmp_path / "x.stats.safetensors")
        assert read.header == found.header and [p.name for p in tmp_path.iterdir()] == ["x.stats.safetensors"]
        for module in found.modules:
            assert read[module].rows == found[module].rows
            assert torch.equal(read[module].second_moment(), found[module].second_moment())
            assert torch.equal(read[module].mean, found[module].mean)
        read.close()


def test_the_model_is_as_before() -> None:
    model = Block().train()
    before = copy.deepcopy(model.state_dict())
    observe(model, batches(1))
    assert model.training and all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_fused_attention_and_flattened_inputs() -> None:
    class Attention(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 2, batch_first=first)
            self.flat, self.first = nn.Linear(12, 4), first

        def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
            x = hidden if self.first else hidden.transpose(0, 1)
            out = self.attention(x, x, x, need_weights=False)[0]
            return self.flat((out if self.first else out.transpose(0, 1)).reshape(-1, 12))

    data = batches(2)
    x = rows_seen(data).double()
    for first in (True, False):
        found = observe(Attention(first), data)
        assert found.modules == ("attention", "flat") and found["flat"].rows == len(x)
        torch.testing.assert_close(found["attention"].second_moment(), x.mT @ x, rtol=1e-6, atol=1e-6)


def test_wrong_input_says_what_is_wrong(tmp_path) -> None:
    with pytest.raises(InputError, match="there was no batch"):
        observe(Block(), [])
    with pytest.raises(InputError, match="no linear layer of Block fits"):
        observe(Block(), batches(1), targets=["nothing"])
    data = batches(1)
    data[0]["hidden"][0, 0, 0] = torch.nan
    with pytest.raises(NonFinite, match="q: the input of this layer"):
        observe(Block(), data)
    with pytest.raises(InputError, match="no statistics of nothing"):
        observe(Block(), batches(1))["nothing"]
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="no statistics file"):
        open_statistics(tmp_path / "other.safetensors")


def test_real_architectures() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(0, 50, (3, 7))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    found = observe(model, [{"input_ids": ids, "attention_mask": mask}])
    holders = found.header.modules
    assert len(holders) == 14 and len(set(holders.values())) == 8  # q = k = v, gate = up
    assert all(found[module].rows == 18 for module in found.modules)
    gpt2 = transformers.GPT2Model(
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16)
    )
    assert set(observe(gpt2, [{"input_ids": ids}]).modules) == {
        f"h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
