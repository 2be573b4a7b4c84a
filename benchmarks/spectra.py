"""Matrices of known singular vectors, made by fast orthogonal transforms: n log n an entry, at any size."""

from __future__ import annotations

import torch
from scipy.fft import dct
from torch import Tensor

ROUNDS = 3  # of random signs and a cosine transform: the vectors are spread evenly


def rotate(x: Tensor, seed: int) -> Tensor:
    """Q x for a random orthogonal Q [m, m] fixed by (m, seed); x float64 [m, k]."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(ROUNDS):
        signs = torch.randint(2, (x.shape[0], 1), generator=generator).double() * 2 - 1
        order = torch.randperm(x.shape[0], generator=generator)
        x = torch.from_numpy(dct((x * signs)[order].numpy(), axis=0, norm="ortho"))
    return x


def spectrum(name: str, r: int) -> Tensor:
    """float64 [r]. heavy: a power law, as fine-tuning updates have it, neighbours within 1/r; fast: geometric down to
    1e-5; clustered: groups of 16 values within 1e-3 of each other, halving; flat: a linear fall to a half."""
    i = torch.arange(r, dtype=torch.float64)
    if name == "heavy":
        return (1 + i) ** -0.6
    if name == "fast":
        return 10 ** (-5 * i / r)
    if name == "clustered":
        return 2.0 ** -(i // 16) * (1 + 1e-3 * (1 - i % 16 / 16))
    return 1 - i / (2 * r)


def known_matrix(
    m: int, n: int, name: str = "heavy", seed: int = 0, k: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a float32 [m, n] and its true U [m, k], s [min(m, n)], V [n, k] in float64."""
    s = spectrum(name, min(m, n))
    square = torch.zeros(m, n, dtype=torch.float64)
    square.diagonal().copy_(s)
    a = rotate(rotate(square, 2 * seed).mT.contiguous(), 2 * seed + 1).mT
    u, v = (
        rotate(torch.eye(m, k, dtype=torch.float64), 2 * seed),
        rotate(torch.eye(n, k, dtype=torch.float64), 2 * seed + 1),
    )
    return a.float().contiguous(), u, s, v


def overlap(basis: Tensor, truth: Tensor) -> float:
    """||basis^T truth||_F^2 / k: 1 where the spaces agree."""
    return float((basis.double().mT @ truth).square().sum() / truth.shape[1])
