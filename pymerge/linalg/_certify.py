"""How many leading singular directions are proven (Wedin's sine theorem for both sides at once, which follows from
Davis and Kahan 1970): with A v_i = s_i u_i + e_i, A^T u_i = s_i v_i, the sine of the largest angle between the leading
j-dimensional spaces and the true ones is at most ||[e_1 .. e_j]||_F / (s_j - s_{j+1} - ||e_{j+1}||)."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_SINE = 0.1


def certified_rank(s: Tensor, errors: Tensor, rank: int) -> int:
    """s float64 [>= rank, + 1 if there is one more singular value], descending; errors float64, ||e_i|| of each."""
    if s.numel() == rank:  # every singular value: what is left is the null space
        s, errors = torch.cat([s, s.new_zeros(1)]), torch.cat([errors, errors.new_zeros(1)])
    tilt = errors[:rank].square().cumsum(0).sqrt()
    gap = s[:rank] - s[1 : rank + 1] - errors[1 : rank + 1]
    proven = ((gap > 0) & (tilt <= LARGEST_SINE * gap)).nonzero()
    return int(proven[-1]) + 1 if proven.numel() else 0
