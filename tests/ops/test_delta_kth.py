from __future__ import annotations

import numpy as np
import pytest
import torch

from pymerge import _C
from pymerge.ops._arguments import mask_arguments
from pymerge.ops.delta_histogram import delta_histogram, delta_histogram_reference
from pymerge.ops.delta_kth import delta_kth, delta_kth_reference
from pymerge.ops.delta_rule import DeltaRule
from tests.ops.cases import DTYPES, KEYS, SIZES, W, buffer, models

MASK = DeltaRule(weights=W, keep=(0.5, 0.9, 1.0), keys=KEYS)
NONE = {"keep": None, "keys": None}


def host_kth(base, tuned, ranks, row_length, keep, keys):
    theta, index = _C.delta_kth(
        buffer(base), [buffer(t) for t in tuned], tuned[0].numel(), ranks, row_length, keep, keys
    )
    return torch.tensor(np.frombuffer(theta, np.float32)), torch.tensor(np.frombuffer(index, np.int64))


def check(base, tuned, ranks, row_length=0, mask=None):
    arguments = NONE if mask is None else mask_arguments(mask)
    theta, index = delta_kth_reference(base, tuned, list(ranks), row_length, **arguments)
    found = delta_kth(base, tuned, ranks, row_length=row_length or None, mask=mask)
    assert torch.equal(found[0], theta) and torch.equal(found[1], index)
    keep, keys = (None, None) if mask is None else (mask.keep, mask.keys)
    hosted = host_kth(base, tuned, ranks, row_length, keep, keys)
    assert torch.equal(hosted[0], theta.reshape(-1)) and torch.equal(hosted[1], index.reshape(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [*SIZES, 200_003])
def test_matches_sorting(n, dtype):
    base, tuned = models(n, dtype)
    for ranks in ((n // 5, 1, n - 1), (0, n, n + 3), (n // 2, n // 100, -1)):
        check(base, tuned, ranks)
    check(None, tuned, (n // 5, n // 3, 2))
    check(base, tuned, (n // 5, n // 2, 2), mask=MASK)


@pytest.mark.parametrize(("rows", "length"), [(1, 5), (7, 1), (300, 33), (40, 4096), (3, 70001)])
def test_rows(rows, length):
    base, tuned = models(rows * length, torch.bfloat16)
    for share in (0.1, 0.5, 1.0):
        check(base, tuned, (int(length * share), 1, length - 1), length)
    check(base, tuned, (length // 2, 1, length - 1), length, MASK)


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(150_000),
        torch.cat([torch.zeros(100_000), torch.ones(50_000)]),
        (torch.arange(150_000) % 2).float(),
        torch.arange(150_000).float(),
        torch.arange(150_000, 0, -1).float(),
        torch.exp(torch.linspace(-80, 80, 150_000)),
        (torch.arange(150_000) % 37 == 0).float() * torch.arange(150_000),
        torch.full((150_000,), torch.inf),
    ],
    ids=["zeros", "two_runs", "alternating", "rising", "falling", "wide", "sparse", "infinite"],
)
def test_values_that_fool_a_sample(values):
    for rank in (1, 2, 4055, 50_000, 75_000, 100_001, 149_999):
        check(None, [values], (rank,))


def test_nan_ranks_first():
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    values[[5, 99_000]] = torch.nan
    theta, index = delta_kth(None, [values], (3,))
    assert theta[0, 0] == values[~values.isnan()].abs().max() and values[index[0, 0] - 1].abs() == theta[0, 0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_histograms_find_the_same_threshold(dtype, masked):
    n = 5000
    base, tuned = models(n, dtype)
    mask = MASK if masked else None
    arguments = mask_arguments(MASK) if masked else NONE
    coarse = delta_histogram(base, tuned, mask=mask)
    assert torch.equal(coarse, delta_histogram_reference(base, tuned, **arguments, prefix=None))
    assert (coarse.sum(1) == n).all()
    prefix = coarse.argmax(1).tolist()
    fine = delta_histogram(base, tuned, prefix=prefix, mask=mask)
    assert torch.equal(fine, delta_histogram_reference(base, tuned, **arguments, prefix=prefix))
    keep, keys = (MASK.keep, MASK.keys) if masked else (None, None)
    hosted = np.zeros((3, 32768), np.int64)
    for low, high in ((0, 1001), (1001, n)):
        buffers = [buffer(t[low:high]) for t in tuned]
        _C.delta_histogram(buffer(base[low:high]), buffers, high - low, low, keep, keys, prefix, hosted)
    assert np.array_equal(hosted, fine.numpy())


def test_equal_entries_are_counted_and_found():
    n = 5000
    base, tuned = models(n)
    size = (tuned[1] - base).abs()
    theta = size[1234].item()
    places = (size == size[1234]).nonzero()[:, 0].tolist()
    arguments = (buffer(base), [buffer(t) for t in tuned], n, 100, None, None)
    assert _C.delta_count_equal(*arguments, [1e30, theta, 1e30]) == [0, len(places), 0]
    found = [
        _C.delta_find_equal(buffer(base), buffer(tuned[1]), n, 100, None, None, theta, i) for i in range(len(places))
    ]
    assert found == [100 + p for p in places]
    assert _C.delta_find_equal(buffer(base), buffer(tuned[1]), n, 100, None, None, theta, len(places)) == -1


def test_opcheck():
    base, tuned = models(300, torch.bfloat16)
    torch.library.opcheck(torch.ops.pymerge.delta_kth.default, (base, tuned, [3, 5, 0], 0, None, None))
    torch.library.opcheck(torch.ops.pymerge.delta_kth.default, (None, tuned, [3, 5, 0], 100, [0.5] * 3, [1, 2, 3]))
    torch.library.opcheck(torch.ops.pymerge.delta_histogram.default, (base, tuned, None, None, None))
    torch.library.opcheck(torch.ops.pymerge.delta_histogram.default, (base, tuned, None, None, [1, 2, 3]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], 0, None, None), r"ranks must have one entry per tuned tensor \(2\), got 1"),
        (([1, 1], 7, None, None), "row_length must divide 10, got 7"),
        (([1, 1], 0, [0.5, 0.5], None), "keep and keys, or neither"),
        (([1, 1], 0, [0.5, float("nan")], [1, 2]), "keep must be in 0..1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pymerge.delta_kth(None, [torch.zeros(10)] * 2, *arguments)
