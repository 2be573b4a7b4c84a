"""What it costs to read weights in other layouts: fp8 with scales against bfloat16, experts turned and stacked.

    python benchmarks/bench_fp8.py [--work DIR]

Files of some 100 MB, read from the page cache in tiles as a merge reads them; one thread, CPU seconds, interleaved.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from timing import best_seconds

from pymerge.checkpoint import ITEMSIZE, AnyTensor, open_checkpoint
from pymerge.checkpoint.stacked import StackedTensor, TurnedTensor

M, N, BLOCK, EXPERTS, TILE = 4096, 7168, 128, 16, 1 << 22


def write_models(work: Path) -> None:
    """A matrix in both dtypes, and experts [h, 2 f] one by one and as one."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(M, N, generator=generator)
    blocks = plain.view(M // BLOCK, BLOCK, N // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448
    entries = (blocks / scale[:, None, :, None]).reshape(M, N).to(torch.float8_e4m3fn)
    experts = torch.randn(EXPERTS, 1024, 2048, generator=generator).bfloat16()
    single = {f"expert {i}": expert.clone() for i, expert in enumerate(experts)}
    held = {"fp8": entries, "fp8_scale_inv": scale, "bfloat16": plain.bfloat16(), "experts": experts, **single}
    work.mkdir(parents=True, exist_ok=True)
    save_file(held, work / "model.safetensors")
    quantised = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (work / "config.json").write_text(json.dumps({"quantization_config": quantised}))


def read(tensor: AnyTensor, buffer: memoryview) -> None:
    width = ITEMSIZE[tensor.dtype]
    for first in range(0, tensor.numel, TILE):
        count = min(TILE, tensor.numel - first)
        tensor.read_into(buffer[: count * width], first * width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(__file__).resolve().parents[1] / "build" / "fp8")
    work = parser.parse_args().work
    write_models(work)
    buffer = memoryview(bytearray(4 * TILE))
    with open_checkpoint(work) as model:
        single = [model[f"expert {i}"] for i in range(EXPERTS)]
        stacked = StackedTensor("stacked", single, model["experts"].shape)
        tensors = {
            "bfloat16": model["bfloat16"],
            "fp8 with scales": model["fp8"],
            "experts as stored": model["experts"],
        }
        tensors |= {"experts stacked": stacked, "experts turned": TurnedTensor(model["experts"])}
        seconds = best_seconds({name: lambda t=t: read(t, buffer) for name, t in tensors.items()}, rounds=9)
    for name, tensor in tensors.items():
        print(f"{name:18} {tensor.numel / seconds[name] / 1e9:5.2f} G entries a second")


if __name__ == "__main__":
    main()
