"""Small models on disk for tests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SHAPES = {"embed.weight": (64, 32), "layers.0.up.weight": (48, 32), "layers.0.up.bias": (48,), "layers.1.norm": (32,)}


def random_tensors(
    seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * scale).to(dtype) for name, shape in shapes.items()}


def tuned_from(base: Mapping[str, Tensor], seed: int, scale: float = 0.1) -> dict[str, Tensor]:
    """A fine-tuned child: the base plus a random update, in the base's dtype."""
    update = random_tensors(seed, {name: tuple(t.shape) for name, t in base.items()}, scale=scale)
    return {name: (t.float() + update[name]).to(t.dtype) for name, t in base.items()}


def write_model(folder: Path, tensors: Mapping[str, Tensor], config: Mapping | None = None, shards: int = 1) -> Path:
    """A Hugging Face folder: one safetensors file, or `shards` of them with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "test", "torch_dtype": "float32"}))
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = {
        name: f"model-{i * shards // len(names) + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)
    }
    for file in dict.fromkeys(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_model(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


def family(
    folder: Path,
    count: int = 3,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
) -> tuple[Path, list[Path]]:
    """A base and `count` fine-tuned children on disk."""
    base = random_tensors(0, shapes, dtype)
    children = [write_model(folder / f"tuned{t}", tuned_from(base, 10 + t)) for t in range(count)]
    return write_model(folder / "base", base), children


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Equal names, dtypes and bits."""
    return list(sorted(a)) == list(sorted(b)) and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8))
        for n in a
    )


@contextmanager
def interrupted_after(segments: int) -> Iterator[None]:
    """The merge inside is interrupted when it has written so many segments."""
    from pymerge.engine.execute import Executor

    written, count = Executor.write, []

    def fail_later(self, segment):
        if len(count) == segments:
            raise KeyboardInterrupt
        written(self, segment)
        count.append(segment)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Executor, "write", fail_later)
        yield
