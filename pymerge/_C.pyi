"""Kernels on host buffers; see csrc/module.cpp. A buffer is (address, dtype code BF16 | F16 | F32 | F64)."""

from collections.abc import Sequence
from typing import Any

from typing_extensions import Buffer as _Bytes

_Buffer = tuple[int, str]

class DeltaParams:
    """A resolved rule: what all tiles and threads of a tensor share. Cuts: float32 and int64 [T, R] as bytes."""

    def __init__(
        self,
        weights: Sequence[float],
        scale: float = 1.0,
        divisor: float = 1.0,
        rescales: Sequence[float] | None = None,
        keep: Sequence[float] | None = None,
        keys: Sequence[int] | None = None,
        row_length: int = 0,
        top_theta: bytes | None = None,
        top_index: bytes | None = None,
        skip_theta: bytes | None = None,
        skip_index: bytes | None = None,
        elect: bool = False,
        tie_sign: int = 1,
        norm: str = "none",
    ) -> None: ...
    @property
    def tasks(self) -> int: ...

def delta_merge(
    base: _Buffer | None,
    tuned: Sequence[_Buffer],
    add: _Buffer | None,
    out: _Buffer,
    count: int,
    index0: int,
    params: DeltaParams,
) -> list[int]:
    """Writes out; counts of non-finite entries: base, tuned_0 .. tuned_{T-1}, add (0 where it is base), out."""

def delta_kth(
    base: _Buffer | None,
    tuned: Sequence[_Buffer],
    count: int,
    ranks: Sequence[int],
    row_length: int = 0,
    keep: Sequence[float] | None = None,
    keys: Sequence[int] | None = None,
    index0: int = 0,
) -> tuple[bytes, bytes]:
    """theta float32 [T, R] and index int64 [T, R]: where the first ranks[t] entries end."""

def delta_histogram(
    base: _Buffer | None,
    tuned: Sequence[_Buffer],
    count: int,
    index0: int,
    keep: Sequence[float] | None,
    keys: Sequence[int] | None,
    prefix: Sequence[int] | None,
    hist: Any,
) -> None:
    """Adds to hist, a writable buffer of int64 [T, 65536], or [T, 32768] with prefix."""

def delta_count_equal(
    base: _Buffer | None,
    tuned: Sequence[_Buffer],
    count: int,
    index0: int,
    keep: Sequence[float] | None,
    keys: Sequence[int] | None,
    theta: Sequence[float],
) -> list[int]: ...
def delta_find_equal(
    base: _Buffer | None,
    tuned: _Buffer,
    count: int,
    index0: int,
    keep: float | None,
    key: int | None,
    theta: float,
    nth: int,
) -> int:
    """Index within the tensor of the nth (from 0) entry whose magnitude is theta; -1 where there are fewer."""

def delta_l1(base: _Buffer | None, tuned: Sequence[_Buffer], count: int, index0: int, params: DeltaParams) -> bytes:
    """float64 [blocks of 2^20 entries, T, 2]: norm of d_t, of selected d_t."""

def delta_gram(base: _Buffer | None, tuned: Sequence[_Buffer], count: int) -> bytes:
    """float64 [blocks of 2^20 entries, T, T]."""

def delta_signs(
    base: _Buffer | None, tuned: Sequence[_Buffer], count: int, index0: int, params: DeltaParams
) -> int: ...
def delta_moments(base: _Buffer | None, tuned: Sequence[_Buffer], count: int) -> tuple[bytes, bytes]:
    """Of T tensors, as MomentSums of csrc/cpu/kernels.h, in this order.

    float64 [2 + T T + T]: base, l1_of_sum, gram [T, T] (s <= t), l1 [T];
    int64 [3 + T (2 T + 33)]: contested, conflicted, octaves [T, 32], both [T, T], opposed [T, T] (s <= t), bad [1 + T]
    """

def count_nonfinite(buffer: _Buffer, count: int) -> tuple[int, int]:
    """How many, and the index of the first (-1: none)."""

def crc32c(data: _Bytes | tuple[int, int], crc: int = 0) -> int:
    """Of a bytes-like object or (address, bytes), continuing from crc."""

def crc32c_combine(first: int, second: int, second_bytes: int) -> int: ...
def gather_rows(
    source: _Bytes, out: _Bytes, row_bytes: int, rows: _Bytes, places: _Bytes, columns: _Bytes | None, unit: int
) -> None:
    """Row rows[i] of source becomes row places[i] of out, its blocks of `unit` bytes in the order of columns (repeated
    over the row); rows, places, columns: int64."""

def decode_scaled(
    source: _Bytes, out: _Bytes, table: _Bytes, scales: _Bytes, first: int, shape: Sequence[int], block: Sequence[int]
) -> None:
    """out[i] = table[source[i]] * the scale of its block, for entries first, first + 1, ... of matrices of `shape` one
    behind the other; out, table [256] and scales: float32, of each block of `block` rows and columns one scale."""

def rename_exchange(a: str, b: str) -> bool:
    """Exchanges two paths in one step; False where the kernel or the file system cannot."""

def cpu_level() -> str: ...
def cpu_features() -> dict[str, bool]: ...
