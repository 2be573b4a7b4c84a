"""Philox4x32-7 in plain PyTorch (Salmon et al., SC 2011), as csrc/common/philox.h."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW32 = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # key increments


def philox4x32(key: int, group: Tensor, plane: int) -> list[Tensor]:
    """Four 32-bit words, in int64, of each counter `group` (int64)."""
    c = [group & _LOW32, group >> 32, torch.full_like(group, plane), torch.zeros_like(group)]
    k0, k1 = key & _LOW32, (key >> 32) & _LOW32
    for _ in range(7):
        p0, p1 = c[0] * _M0, c[2] * _M1  # 64-bit products; the sign that int64 gives them is masked away
        high0, high1 = (p0 >> 32) & _LOW32, (p1 >> 32) & _LOW32
        c = [high1 ^ c[1] ^ k0, p1 & _LOW32, high0 ^ c[3] ^ k1, p0 & _LOW32]
        k0, k1 = (k0 + _W0) & _LOW32, (k1 + _W1) & _LOW32
    return c


def draws(key: int, index: Tensor, plane: int) -> Tensor:
    """16 random bits of each entry, in int64: Philox4x32-7 of (entry index >> 3), half-word (entry index & 7)."""
    group, half = index >> 3, index & 7
    c = philox4x32(key, group, plane)
    word = torch.stack(c)[half >> 1, torch.arange(len(index), device=index.device)]
    return (word >> (16 * (half & 1))) & 0xFFFF


def run_of_draws(key: int, first: int, count: int, plane: int, device: torch.device) -> Tensor:
    """`draws` of the entries first .. first + count - 1, int64 [count]: one Philox call for eight of them."""
    groups = torch.arange(first >> 3, (first + count + 7) >> 3, device=device)
    words = torch.stack(philox4x32(key, groups, plane), dim=1)  # [groups, 4]
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=2).reshape(-1)
    return halves[first & 7 :][:count]
