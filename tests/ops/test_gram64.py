"""gram64: x^T x in float64 of stored matrices."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from pymerge import _C
from pymerge.ops.gram64 import gram64, gram64_reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [(1, 1), (5, 3), (300, 1), (1, 50), (256, 24), (513, 97), (2, 70, 33), (3, 2, 200, 8), (6, 40, 130)]
EMPTY = [(0, 4), (4, 0), (0, 0), (2, 0, 3), (0, 3, 3)]


def matrices(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-9, 9, shape, generator=generator)).to(dtype)


def views(x: torch.Tensor) -> list[torch.Tensor]:
    """The same memory read in other orders."""
    views = [x, x.mT, x[..., ::2, :], x[..., ::3].mT, x.flip(-2)]
    return views + ([x.transpose(0, 1)] if x.dim() > 2 else [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_matches_the_float64_product(shape, dtype):
    for x in views(matrices(shape, dtype)):
        got, want, size = gram64(x), gram64_reference(x), gram64_reference(x.abs())
        assert got.dtype == torch.float64 and got.shape == want.shape
        # either sum of m products is within m eps / 2 of the true one, relative to the sum of magnitudes
        assert ((got - want).abs() <= max(x.shape[-2], 1) * 2.0**-52 * size).all()
        assert torch.equal(got, got.mT)


def test_products_of_stored_values_are_exact():
    x = matrices((1, 37), torch.float32)
    assert torch.equal(gram64(x), x.double().T * x.double())


def test_non_finite_entries_stay_in_their_row_and_column():
    x = matrices((300, 50), torch.float32)
    x[280, 7] = float("nan")
    x[3, 9] = float("inf")
    got = gram64(x)
    bad = torch.zeros(50, 50, dtype=torch.bool)
    bad[[7, 9], :] = bad[:, [7, 9]] = True
    assert torch.equal(~torch.isfinite(got), bad)


def test_batches_and_threads_do_not_change_the_bits():
    x = matrices((5, 700, 60), torch.float32)
    whole, threads = gram64(x), torch.get_num_threads()
    assert torch.equal(whole, torch.stack([gram64(one) for one in x]))
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(gram64(x), whole) and torch.equal(gram64(x[0]), whole[0])
    finally:
        torch.set_num_threads(threads)


DIGEST = """
import torch, zlib
from pymerge import _C
from pymerge.ops.gram64 import gram64
from tests.ops.test_gram64 import matrices
crc = 0
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for shape in ((5, 3), (700, 61), (2, 30, 130)):
        crc = zlib.crc32(gram64(matrices(shape, dtype)).numpy().tobytes(), crc)
        crc = zlib.crc32(gram64(matrices(shape, dtype).mT).numpy().tobytes(), crc)
print(_C.cpu_level(), crc)
"""


def test_every_cpu_level_gives_the_same_bits():
    features = _C.cpu_features()
    levels = ["baseline"] + [level for level in ("avx2", "avx512") if features[level]]
    found = {}
    for level in levels:
        environment = {**os.environ, "PYMERGE_CPU": level, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
        run = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True
        )
        name, found[level] = run.stdout.split()
        assert name == level
    assert len(set(found.values())) == 1, found


def test_opcheck_and_compile():
    for x in (matrices((2, 9, 5), torch.float32), matrices((7, 4), torch.bfloat16).mT, torch.empty(0, 3)):
        torch.library.opcheck(torch.ops.pymerge.gram64.default, (x,))
    x = matrices((40, 12), torch.float32)
    compiled = torch.compile(lambda a: gram64(a).diagonal() + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), gram64(x).diagonal() + 1)


def test_bad_arguments():
    with pytest.raises(RuntimeError, match=r"gram64: x must be \[..., m, n\], got \[3\]"):
        gram64(torch.zeros(3))
    with pytest.raises(RuntimeError, match="gram64: x must be bfloat16, float16, float32 or float64, got Int"):
        gram64(torch.zeros(3, 3, dtype=torch.int32))


def test_fuzzed_calls_raise_or_are_right():
    random.seed(zlib.crc32(b"gram64"))
    dtypes, made = [*DTYPES, torch.int64, torch.bool, torch.complex64], 0
    for _ in range(1000):
        shape = [random.choice([0, 1, 2, 3, 9]) for _ in range(random.randrange(5))]
        x: object = torch.ones(shape, dtype=random.choice(dtypes))
        x = random.choice([x] * 6 + [None, 3, [x], x.to_sparse() if shape else "x"])  # type: ignore[attr-defined]
        try:
            got = torch.ops.pymerge.gram64(x)
        except (RuntimeError, TypeError, AttributeError):  # None reaches the reference
            continue
        got = got.to_dense() if got.is_sparse else got  # sparse tensors have no kernel and take the reference
        assert isinstance(x, torch.Tensor) and (got == x.shape[-2]).all()
        made += 1
    assert made > 100
