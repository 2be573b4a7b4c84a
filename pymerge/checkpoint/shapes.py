"""Models without weights: names and shapes as a config says, to be planned and never read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from pymerge.checkpoint.byte_tensor import ByteTensor
from pymerge.checkpoint.header import ITEMSIZE
from pymerge.checkpoint.read import Checkpoint
from pymerge.errors import InputError

Shapes = Iterator[tuple[str, tuple[int, ...]]]


class ShapeTensor(ByteTensor):
    """A tensor of which only name, dtype (safetensors code) and shape are known."""

    __slots__ = ("dtype", "name", "nbytes", "offset", "shape")
    file: Path | None = None

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self.name, self.dtype, self.shape, self.offset = name, dtype, shape, 0
        self.nbytes = math.prod(shape) * ITEMSIZE[dtype]

    @property
    def stored(self) -> str:
        return self.dtype

    def read_into(self, view: memoryview, start: int = 0) -> NoReturn:
        raise InputError(f"{self.name}: only its shape is known, there are no values to read")


def shape_models(config: Mapping[str, Any], count: int, dtype: str = "BF16") -> tuple[Checkpoint, ...]:
    """A base and models like it, without weights. The models share their tensors, the base has its own: a tensor that
    is the base's is one that fine-tuning has left alone.

    config   as in a config.json
    Raises   InputError: an architecture of which the names are not known here, a value that is missing"""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise InputError(f"shapes are known of the model types {', '.join(ARCHITECTURES)}, the config's is {kind!r}")
    try:
        shapes = dict(shapes_of(config, ARCHITECTURES[kind]))
    except KeyError as error:
        raise InputError(
            f"the config of a {kind} model lacks {error.args[0]!r}, from which its shapes follow"
        ) from None
    base, tuned = made(shapes, dtype), made(shapes, dtype)
    return tuple(Checkpoint(None, None, base if i == 0 else tuned, []) for i in range(count))


def made(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> dict[str, Any]:
    """The tensors, by name."""
    return {name: ShapeTensor(name, dtype, shape) for name, shape in shapes.items()}


def shapes_of(config: Mapping[str, Any], layer: Callable[[Mapping[str, Any], int], Shapes]) -> Shapes:
    """Names and shapes in the order of Hugging Face's files."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for number in range(config["num_hidden_layers"]):
        for name, shape in layer(config, number):
            yield f"model.layers.{number}.{name}", shape
        yield f"model.layers.{number}.input_layernorm.weight", (hidden,)
        yield f"model.layers.{number}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings", False):
        yield "lm_head.weight", (vocabulary, hidden)


def attention(c: Mapping[str, Any]) -> Shapes:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    width = c.get("head_dim") or hidden // heads
    for letter, count in (("q", heads), ("k", c["num_key_value_heads"]), ("v", c["num_key_value_heads"])):
        yield f"self_attn.{letter}_proj.weight", (count * width, hidden)
    yield "self_attn.o_proj.weight", (hidden, heads * width)


def mlp(place: str, hidden: int, inner: int) -> Shapes:
    for name in ("gate", "up"):
        yield f"{place}.{name}_proj.weight", (inner, hidden)
    yield f"{place}.down_proj.weight", (hidden, inner)


def llama(c: Mapping[str, Any], number: int) -> Shapes:
    yield from attention(c)
    yield from mlp("mlp", c["hidden_size"], c["intermediate_size"])


def mixtral(c: Mapping[str, Any], number: int) -> Shapes:
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    yield from attention(c)
    yield "block_sparse_moe.gate.weight", (c["num_local_experts"], hidden)
    for expert in range(c["num_local_experts"]):
        for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
            yield f"block_sparse_moe.experts.{expert}.{name}.weight", shape


def deepseek_v3(c: Mapping[str, Any], number: int) -> Shapes:
    """Without the layers for multi-token prediction."""
    hidden, heads, rank, latent = c["hidden_size"], c["num_attention_heads"], c["q_lora_rank"], c["kv_lora_rank"]
    plain, rotary, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    yield "self_attn.q_a_proj.weight", (rank, hidden)
    yield "self_attn.q_a_layernorm.weight", (rank,)
    yield "self_attn.q_b_proj.weight", (heads * (plain + rotary), rank)
    yield "self_attn.kv_a_proj_with_mqa.weight", (latent + rotary, hidden)
    yield "self_attn.kv_a_layernorm.weight", (latent,)
    yield "self_attn.kv_b_proj.weight", (heads * (plain + value), latent)
    yield "self_attn.o_proj.weight", (hidden, heads * value)
    if number < c["first_k_dense_replace"]:
        yield from mlp("mlp", hidden, c["intermediate_size"])
        return
    inner, experts = c["moe_intermediate_size"], c["n_routed_experts"]
    yield "mlp.gate.weight", (experts, hidden)
    yield "mlp.gate.e_score_correction_bias", (experts,)
    for expert in range(experts):
        yield from mlp(f"mlp.experts.{expert}", hidden, inner)
    yield from mlp("mlp.shared_experts", hidden, inner * c["n_shared_experts"])


ARCHITECTURES: dict[str, Callable[[Mapping[str, Any], int], Shapes]] = {
    "llama": llama,
    "mistral": llama,
    "mixtral": mixtral,
    "deepseek_v3": deepseek_v3,
}


def _llama3(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    config = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return config | {"num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128256}


# Values of the models' published config.json (meta-llama/Meta-Llama-3-8B, -70B, Llama-3.1-405B;
# mistralai/Mixtral-8x22B-v0.1; deepseek-ai/DeepSeek-V3).
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama3-8b": _llama3(4096, 14336, 32, 32),
    "llama3-70b": _llama3(8192, 28672, 80, 64),
    "llama3-405b": _llama3(16384, 53248, 126, 128),
    "mixtral-8x22b": {
        "model_type": "mixtral",
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_hidden_layers": 56,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "vocab_size": 32000,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "vocab_size": 129280,
    },
}
