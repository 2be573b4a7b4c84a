"""Arguments of the linalg functions: refused with names and numbers before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from pymerge.errors import NonFinite

FLOATS = (torch.float32, torch.float64)


def check_matrices(what: str, a: Tensor) -> None:
    if not isinstance(a, Tensor):
        raise ValueError(f"{what} must be a tensor or an array with __dlpack__, got {type(a).__name__}")
    if a.dtype not in FLOATS:
        raise ValueError(f"{what} must be float32 or float64, got {a.dtype}: widen it first (twice the memory)")
    if a.dim() < 2:
        raise ValueError(f"{what} must be a matrix or a batch of matrices, got shape {list(a.shape)}")


def check_count(what: str, count: int, shape: torch.Size) -> None:
    most = min(shape[-2:])
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
        raise ValueError(f"{what} must be an integer in 1..{most} for a matrix {list(shape[-2:])}, got {count!r}")


def check_choice(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {value!r}")


def check_finite(what: str, norm: float, a: Tensor, index: int, batch: torch.Size) -> None:
    """`norm` is the Frobenius norm: finite if all entries are (of moderate float64 size, which is looked at again)."""
    if norm == norm and norm != float("inf"):
        return
    bad = int((~torch.isfinite(a)).sum())
    if bad == 0:
        return
    where = list(torch.unravel_index(torch.tensor(index), batch)) if batch else []
    place = f" in matrix {[int(i) for i in where]} of the batch {list(batch)}" if batch else ""
    raise NonFinite(
        f"{what} has {bad} NaN or infinite entries of {a.numel()}{place}: find out which tensor they are in"
    )
