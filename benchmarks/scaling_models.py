"""What scaling.py merges: Llama-shaped checkpoints of any depth, statistics of their layers' inputs, LoRA adapters.

    python benchmarks/scaling_models.py DIR --hidden 256 --layers 62 --tasks 2 [--rows 2048] [--adapters 8x2]

DIR/base, DIR/t1 ... in bfloat16 (structured.py). One layer is drawn and written as often as asked: no method looks
for layers that are equal, and 9 GB take seconds. With --rows also DIR/t1.stats.safetensors ... as `pymerge observe`
writes them, with --adapters DIR/r8t1 and DIR/r8t2 of rank 8, of all matrices of the layers. A process of its own: the
one that starts it stays small.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side.checkpoints import Entry, header, tensors
from structured import write_models

HEAD = 64
VOCABULARY = 1000  # so few that layers are what is merged


def model_config(hidden: int, layers: int) -> dict[str, Any]:
    """config.json of a Llama with full attention and an MLP 2.75 times as wide."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def nbytes(entries: Sequence[Entry]) -> int:
    return 2 * sum(math.prod(shape) for _, shape in entries)


def model_bytes(hidden: int, layers: int) -> int:
    return nbytes(list(tensors(model_config(hidden, layers))))


def layers_of(gb: float, hidden: int) -> int:
    """How many layers make a model of about so many GB."""
    without = model_bytes(hidden, 0)
    return max(1, round((gb * 1e9 - without) / (model_bytes(hidden, 1) - without)))


def matrices(hidden: int) -> list[Entry]:
    """Of one layer."""
    return [(name, shape) for name, shape in tensors(model_config(hidden, 1)) if ".layers." in name and len(shape) == 2]


def deepened(source: Path, target: Path, hidden: int, layers: int) -> None:
    """The checkpoint of one layer with that layer as often as asked."""
    entries = list(tensors(model_config(hidden, 1)))
    first = next(at for at, (name, _) in enumerate(entries) if ".layers." in name)
    last = next(at for at in range(first, len(entries)) if ".layers." not in entries[at][0])
    parts = [(nbytes(entries[:first]), 1), (nbytes(entries[first:last]), layers), (nbytes(entries[last:]), 1)]
    target.mkdir()
    (target / "config.json").write_text(json.dumps(model_config(hidden, layers), indent=2) + "\n")
    with open(source / "model.safetensors", "rb") as file, open(target / "model.safetensors", "wb") as out:
        out.write(header(list(tensors(model_config(hidden, layers)))))
        file.seek(len(header(entries)))
        for length, times in parts:
            block = file.read(length)
            for _ in range(times):
                out.write(block)


def write_models_of(root: Path, hidden: int, layers: int, tasks: int) -> None:
    one = root / "one"
    write_models(one, list(tensors(model_config(hidden, 1))), tasks, "BF16")
    for name in ("base", *(f"t{task}" for task in range(1, tasks + 1))):
        deepened(one / name, root / name, hidden, layers)
    shutil.rmtree(one)


def inputs(width: int, rows: int, task: int) -> np.ndarray:
    """float32 [rows, width] with a power-law spectrum and a mean, as a layer of that task sees them."""
    rng = np.random.default_rng([task, width])
    x = rng.standard_normal((rows, width), np.float32)
    return x * np.arange(1, width + 1, dtype=np.float32) ** -0.4 + 0.1 * rng.standard_normal(width, np.float32)


def write_statistics(root: Path, hidden: int, layers: int, tasks: int, rows: int) -> None:
    """q, k and v of a layer share an input, and so do gate and up."""
    import torch

    from pymerge.statistics.moments import Accumulator
    from pymerge.statistics.store import Header, StatisticsWriter

    holders = {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj"}
    holders |= {"gate_proj": "gate_proj", "up_proj": "gate_proj", "down_proj": "down_proj"}
    names = [name.removesuffix(".weight") for name, _ in matrices(hidden)]
    widths = {name.removesuffix(".weight"): shape[1] for name, shape in matrices(hidden)}
    shared = {name: f"{name.rsplit('.', 1)[0]}.{holders[name.rsplit('.', 1)[1]]}" for name in names}
    for task in range(1, tasks + 1):
        seen = {}
        for holder in dict.fromkeys(shared.values()):
            accumulator = Accumulator(holder, torch.float32)
            accumulator.add(torch.from_numpy(inputs(widths[holder], rows, task)))
            seen[holder] = accumulator.finish()
        modules = {}
        with StatisticsWriter(root / f"t{task}.stats.safetensors") as writer:
            for layer in range(layers):
                at = f".layers.{layer}."
                modules |= {n.replace(".layers.0.", at): s.replace(".layers.0.", at) for n, s in shared.items()}
                for holder, moments in seen.items():
                    writer.add(holder.replace(".layers.0.", at), moments)
            writer.finish(Header(model={"class": "LlamaForCausalLM"}, data={"batches": 1}, modules=modules))


def factors(hidden: int, layers: int, rank: int, task: int) -> Iterator[tuple[Entry, np.ndarray]]:
    """float32 A [rank, in] and B [out, rank] of all matrices, the same in every layer."""
    rng = np.random.default_rng([task, rank])
    one = []
    for name, (m, n) in matrices(hidden):
        module = f"base_model.model.{name.removesuffix('.weight')}"
        one.append((f"{module}.lora_A.weight", rng.standard_normal((rank, n), np.float32) / n**0.5))
        one.append((f"{module}.lora_B.weight", rng.standard_normal((m, rank), np.float32) / 50))
    for layer in range(layers):
        for name, values in one:
            yield (name.replace(".layers.0.", f".layers.{layer}."), values.shape), values


def write_adapters(root: Path, hidden: int, layers: int, tasks: int, rank: int) -> None:
    for task in range(1, tasks + 1):
        folder = root / f"r{rank}t{task}"
        folder.mkdir()
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
        config["base_model_name_or_path"] = str(root / "base")
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with open(folder / "adapter_model.safetensors", "wb") as out:
            out.write(header([entry for entry, _ in factors(hidden, layers, rank, task)], "F32"))
            for _, values in factors(hidden, layers, rank, task):
                out.write(values.data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=0, help="of the samples behind the statistics; 0: none are written")
    parser.add_argument("--adapters", default="", help="RANKxTASKS, ...")
    args = parser.parse_args()
    shutil.rmtree(args.root, ignore_errors=True)
    args.root.mkdir(parents=True)
    write_models_of(args.root, args.hidden, args.layers, args.tasks)
    if args.rows:
        write_statistics(args.root, args.hidden, args.layers, args.tasks, args.rows)
    for asked in filter(None, args.adapters.split(",")):
        rank, tasks = map(int, asked.split("x"))
        write_adapters(args.root, args.hidden, args.layers, tasks, rank)


if __name__ == "__main__":
    main()
