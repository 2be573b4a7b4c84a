"""Tensors that are computed from those of a checkpoint."""

from __future__ import annotations

import torch

from pymerge.checkpoint import open_checkpoint
from pymerge.checkpoint.made import MadeTensor


def test_a_made_tensor_is_made_once_for_all_its_ranges():
    made = []

    def double(tensor):
        made.append(tensor)
        return 2 * tensor.float()

    with open_checkpoint({"w": torch.arange(6, dtype=torch.bfloat16)}) as checkpoint:
        found = MadeTensor(checkpoint["w"], double)
        assert (found.dtype, found.nbytes, found.shape) == ("F32", 24, (6,))
        parts = [memoryview(bytearray(8)) for _ in range(3)]
        for n, part in enumerate(parts):
            found.read_into(part, 8 * n)
        values = torch.cat([torch.frombuffer(part, dtype=torch.float32) for part in parts])
    assert values.tolist() == [0, 2, 4, 6, 8, 10] and len(made) == 1
