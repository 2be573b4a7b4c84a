"""Models with task vectors shaped like trained ones, of any architecture, written to safetensors by blocks of rows.

A matrix's task vector has entries of standard deviation `std`: a power-law spectrum on directions that all tasks share
(each task with weights of its own), another on directions of the task, and dense noise, so that it has full rank.
Vectors get noise alone. Deterministic; numpy alone; a block of rows and two thin factors are all that is ever held.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from side_by_side.checkpoints import Entry, from_bf16, header, tensors, to_bf16

VERSION = 2  # raise it when the bytes change
ENERGY = {"shared": 0.4, "own": 0.4, "noise": 0.2}  # shares of the squared norm
DECAY = 0.6  # singular value i is (1 + i)^-0.6: spectra.py's "heavy"
DIRECTIONS = 16  # of each kind, min(m, n) / 16
BASE_STD, STD = 0.02, 1e-3
BLOCK = 1 << 23  # entries


def vit_blocks(blocks: int, width: int = 768) -> list[Entry]:
    """Transformer blocks of CLIP's ViT-B/32 with separate q, k and v: 7.09 M entries each, or of another width."""
    out: list[Entry] = []
    for i in range(blocks):
        layer = f"vision_model.encoder.layers.{i}."
        linear = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        for name, shape in (linear | {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}).items():
            out += [(f"{layer}{name}.weight", shape), (f"{layer}{name}.bias", shape[:1])]
        for name in ("layer_norm1", "layer_norm2"):
            out += [(f"{layer}{name}.weight", (width,)), (f"{layer}{name}.bias", (width,))]
    return out


def llama_layers(layers: int, hidden: int, kv: int, mlp: int) -> list[Entry]:
    """Transformer blocks of a Llama, in the order in which it lists them."""
    shape = {"hidden_size": hidden, "intermediate_size": mlp, "head_dim": kv, "num_key_value_heads": 1}
    config = shape | {"vocab_size": 1, "num_hidden_layers": layers, "tie_word_embeddings": True}
    return [(name, size) for name, size in tensors(config) if ".layers." in name]


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First and last row + 1 of blocks of at most BLOCK entries."""
    step = max(1, BLOCK // int(np.prod(shape[1:])))
    for first in range(0, shape[0], step):
        yield first, min(shape[0], first + step)


def base_rows(shape: tuple[int, ...], number: int) -> Iterator[np.ndarray]:
    """The base's tensor of that number, float32, by blocks of rows."""
    for first, last in row_blocks(shape):
        x = np.random.default_rng([VERSION, number, 0, first]).standard_normal((last - first, *shape[1:]), np.float32)
        yield 1 + np.float32(0.05) * x if len(shape) == 1 else np.float32(BASE_STD) * x


def update_rows(shape: tuple[int, ...], number: int, task: int, std: float = STD) -> Iterator[np.ndarray]:
    """The task vector of task 1, 2, ..., float32, by blocks of rows."""
    factors = _factors(shape, number, task) if len(shape) == 2 else None
    noise = np.float32(std * (ENERGY["noise"] ** 0.5 if factors else 1.0))
    for first, last in row_blocks(shape):
        rng = np.random.default_rng([VERSION, number, task, first])
        x = rng.standard_normal((last - first, *shape[1:]), np.float32) * noise
        if factors:
            left, right = factors
            x += np.float32(std) * (left[first:last] @ right)
        yield x


def _factors(shape: tuple[int, ...], number: int, task: int) -> tuple[np.ndarray, np.ndarray]:
    """[m, 2k] and [2k, n]: the shared directions, then the task's own; entries of the product have variance 0.8."""
    m, n = shape
    k = max(1, min(m, n) // DIRECTIONS)
    spectrum = (1.0 + np.arange(k)) ** -DECAY
    lefts, rights = [], []
    for kind, key in (("shared", 0), ("own", task)):
        rng = np.random.default_rng([VERSION, number, key, 1 << 40])  # no block starts at that row
        lefts.append(rng.standard_normal((m, k), np.float32))
        rights.append(rng.standard_normal((k, n), np.float32))
        gains = spectrum * (np.random.default_rng([VERSION, number, task, 1 << 41]).uniform(0.5, 1.5, k))
        gains *= (ENERGY[kind] / np.square(gains).sum()) ** 0.5
        lefts[-1] *= gains.astype(np.float32)
    return np.hstack(lefts), np.vstack(rights)


def write_models(root: Path, entries: Sequence[Entry], tasks: int, dtype: str, config: dict | None = None) -> None:
    """root/base, root/t1 ... root/tT, each with model.safetensors (and config.json), unless they are there already."""
    request = {"version": VERSION, "entries": [[n, list(s)] for n, s in entries], "tasks": tasks, "dtype": dtype}
    mark = root / "request.json"
    if mark.is_file() and json.loads(mark.read_text()) == request:
        return
    shutil.rmtree(root, ignore_errors=True)
    for task in range(tasks + 1):
        folder = root / (f"t{task}" if task else "base")
        folder.mkdir(parents=True)
        _write(folder / "model.safetensors", root / "base" / "model.safetensors", list(entries), task, dtype)
        if config:
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    mark.write_text(json.dumps(request))


def _write(path: Path, base_path: Path, entries: list[Entry], task: int, dtype: str) -> None:
    """One file; a task's weights are the stored base's plus its task vector, rounded to dtype (F32 or BF16)."""
    stored = np.dtype(np.uint16 if dtype == "BF16" else np.float32)
    head = header(entries, dtype)
    offset = len(head)
    with open(path, "wb") as out:
        out.write(head)
        for number, (_, shape) in enumerate(entries):
            for rows in update_rows(shape, number, task) if task else base_rows(shape, number):
                if task:
                    base = np.fromfile(base_path, stored, count=rows.size, offset=offset).reshape(rows.shape)
                    rows += from_bf16(base) if dtype == "BF16" else base
                out.write((to_bf16(rows) if dtype == "BF16" else rows).data)
                offset += rows.size * stored.itemsize
