"""LLaMA-shaped bf16 checkpoints of a given size: one base and fine-tuned children of it.

    python benchmarks/side_by_side/checkpoints.py DIR --gb 1.2 --models 3 --shard-gb 5

The weights are random but shaped like trained ones (matrices of standard deviation 0.02, norms around 1); a child is
its base plus small deltas, with some entries left unchanged. Written tensor by tensor, so one tensor is the most that
is ever held. Deterministic: a folder that already holds the same request is left alone. Needs numpy alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

VERSION = 1  # raise it when the bytes change
UNCHANGED = 0.3  # share of a child's entries that equal the base's
DELTA = 1.5e-3  # standard deviation of the deltas of matrices with entries of 0.02
# below this many GB: hidden, intermediate, heads, key/value heads, vocabulary
SHAPES = ((0.3, (512, 1408, 8, 4, 8000)), (3.0, (1536, 4096, 12, 12, 32000)), (10.0, (2560, 6912, 20, 20, 32000)))
LARGEST = (4096, 14336, 32, 8, 128256)

Entry = tuple[str, tuple[int, ...]]


def model_config(gb: float) -> dict:
    """config.json of a LLaMA of about `gb` gigabytes in bfloat16."""
    hidden, intermediate, heads, kv_heads, vocabulary = next((s for limit, s in SHAPES if gb < limit), LARGEST)
    kv = hidden // heads * kv_heads
    layer = 2 * hidden * hidden + 2 * kv * hidden + 3 * hidden * intermediate + 2 * hidden
    layers = max(1, round((gb * 5e8 - 2 * vocabulary * hidden) / layer))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def tensors(config: dict) -> Iterator[Entry]:
    """Names and shapes, in the order in which a LLaMA lists them."""
    h, i, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["head_dim"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (v, h)
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        yield layer + "self_attn.q_proj.weight", (h, h)
        yield layer + "self_attn.k_proj.weight", (kv, h)
        yield layer + "self_attn.v_proj.weight", (kv, h)
        yield layer + "self_attn.o_proj.weight", (h, h)
        yield layer + "mlp.gate_proj.weight", (i, h)
        yield layer + "mlp.up_proj.weight", (i, h)
        yield layer + "mlp.down_proj.weight", (h, i)
        yield layer + "input_layernorm.weight", (h,)
        yield layer + "post_attention_layernorm.weight", (h,)
    yield "model.norm.weight", (h,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (v, h)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, rounded to nearest even."""
    bits = x.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def base_values(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal(shape, dtype=np.float32)
    return to_bf16(1 + 0.05 * x if len(shape) == 1 else np.float32(0.02) * x)


def child_values(base: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    delta = rng.standard_normal(base.shape, dtype=np.float32)
    unchanged = rng.random(base.shape, dtype=np.float32) < UNCHANGED
    delta[unchanged] = 0
    return to_bf16(from_bf16(base) + np.float32(DELTA) * delta)


def shards(entries: list[Entry], shard_bytes: int) -> list[list[Entry]]:
    """Entries in order, a new shard where the next one would not fit: what save_pretrained does."""
    out: list[list[Entry]] = [[]]
    used = 0
    for name, shape in entries:
        size = 2 * int(np.prod(shape))
        if out[-1] and used + size > shard_bytes:
            out.append([])
            used = 0
        out[-1].append((name, shape))
        used += size
    return out


def header(entries: list[Entry], dtype: str = "BF16") -> bytes:
    """The first bytes of a safetensors file with those tensors one after another; dtype BF16 or F32."""
    table: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in entries:
        end = offset + (2 if dtype == "BF16" else 4) * int(np.prod(shape))
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_model(folder: Path, config: dict, model: int, shard_bytes: int) -> None:
    """model 0 is the base; others are read against the base's files beside them."""
    staging = folder.with_name(folder.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    parts = shards(list(tensors(config)), shard_bytes)
    weight_map = {}
    number = 0
    for s, part in enumerate(parts):
        file = "model.safetensors" if len(parts) == 1 else f"model-{s + 1:05d}-of-{len(parts):05d}.safetensors"
        head = header(part)
        offset = len(head)
        with open(staging / file, "wb") as out:
            out.write(head)
            for name, shape in part:
                rng = np.random.default_rng([VERSION, model, number])
                if model == 0:
                    values = base_values(shape, rng)
                else:
                    count = int(np.prod(shape))
                    source = folder.with_name("base") / file
                    base = np.fromfile(source, dtype=np.uint16, count=count, offset=offset).reshape(shape)
                    values = child_values(base, rng)
                out.write(values.data)
                offset += values.nbytes
                weight_map[name] = file
                number += 1
    if len(parts) > 1:
        total = sum(2 * int(np.prod(shape)) for part in parts for _, shape in part)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (staging / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def make(root: Path, gb: float, models: int, shard_gb: float) -> None:
    """root/base, root/m1 ... unless they are there already."""
    config = model_config(gb)
    request = {"version": VERSION, "config": config, "shard_gb": shard_gb}
    for model in range(models + 1):
        folder = root / ("base" if model == 0 else f"m{model}")
        mark = root / f"{folder.name}.json"
        if folder.is_dir() and mark.is_file() and json.loads(mark.read_text()) == request:
            continue
        write_model(folder, config, model, int(shard_gb * 1e9))
        mark.write_text(json.dumps(request))
        print(f"made {folder}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--gb", type=float, default=1.2)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--shard-gb", type=float, default=5.0)
    args = parser.parse_args()
    make(args.root, args.gb, args.models, args.shard_gb)
