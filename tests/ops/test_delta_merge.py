from __future__ import annotations

import pytest
import torch

from pymerge.ops._random import draws
from pymerge.ops._reference import random_mask
from pymerge.ops.delta import merge_by_rule
from pymerge.ops.delta_merge import delta_merge
from pymerge.ops.delta_rule import DeltaRule
from tests.ops.cases import (
    DTYPES,
    SIZES,
    W,
    host_merge,
    merge_arguments,
    models,
    reference,
    resolved,
    rules,
    same_bits,
)

NAMES = sorted(rules(241))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_host_module_and_reference_agree_bitwise(name, dtype):
    for n in [*SIZES, 241 * 20]:
        if name not in rules(n):
            continue
        base, tuned = models(n, dtype)
        for with_base in (True, False):
            first = base if with_base else None
            rule = resolved(rules(n)[name], first, tuned)
            expected, bad = reference(rule, first, tuned, first, dtype)
            out, counted = delta_merge(rule, first, tuned, add=first, out_dtype=dtype)
            assert same_bits(out, expected), (n, with_base)
            assert counted.tolist() == bad.tolist() == [0] * 6
            for tiles in (1, 3):
                hosted, _ = host_merge(rule, first, tuned, first, dtype, tiles)
                assert same_bits(hosted, expected), (n, with_base, tiles)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_dtypes_and_float32_output(name):
    base, tuned = models(241 * 5)
    base, tuned = base.bfloat16(), [tuned[0].half(), tuned[1], tuned[2].double()]
    rule = resolved(rules(241 * 5)[name], base, tuned)
    add = tuned[1]
    expected, _ = reference(rule, base, tuned, add, torch.float32)
    assert same_bits(delta_merge(rule, base, tuned, add=add)[0], expected)
    assert same_bits(host_merge(rule, base, tuned, add, torch.float32, 4)[0], expected)


@pytest.mark.parametrize("tasks", [1, 2, 4, 5, 33, 40])
def test_any_number_of_tasks(tasks):
    base, tuned = models(3001, torch.bfloat16, tasks)
    rule = DeltaRule(weights=tuple(0.1 * t + 0.1 for t in range(tasks)), elect="mergekit", norm="weights")
    expected, _ = reference(rule, base, tuned, base, torch.bfloat16)
    assert same_bits(delta_merge(rule, base, tuned, add=base, out_dtype=torch.bfloat16)[0], expected)


def test_non_contiguous_inputs_and_shape():
    base, tuned = models(64 * 33)
    base, tuned = base.view(33, 64).t(), [t.view(33, 64).t() for t in tuned]
    rule = resolved(rules(64 * 33)["ties_mergekit"], base.contiguous(), [t.contiguous() for t in tuned])
    expected, _ = reference(rule, base, tuned, base, torch.float32)
    out, _ = delta_merge(rule, base, tuned, add=base)
    assert out.shape == (64, 33) and out.is_contiguous() and torch.equal(out, expected)
    assert torch.equal(merge_by_rule(rules(64 * 33)["ties_mergekit"], base, tuned, base), expected)


def test_against_float64_truth():
    """One rounding of d, two of products, T of sums, three at the end: below 11 ulp of the largest term (times 4)."""
    base, tuned = models(20000)
    rule = DeltaRule(weights=W, scale=0.7, divisor=1.5)
    out, _ = delta_merge(rule, base, tuned, add=base)
    d = [t.double() - base.double() for t in tuned]
    truth = base.double() + 0.7 / 1.5 * sum(w * x for w, x in zip(W, d, strict=True))
    largest = torch.stack([base.double().abs(), *(t.double().abs() for t in tuned)]).max(0).values
    assert ((out.double() - truth).abs() <= 11 * 2.0**-24 * 4 * largest).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["linear", "dare", "trim", "ties_mergekit"])
def test_non_finite_entries_are_counted_even_where_not_selected(name, dtype):
    n = 5000
    base, tuned = models(n, dtype)
    base[3] = torch.nan
    tuned[0][[10, 1000, 4999]] = torch.inf
    tuned[2][[1, 2]] = torch.nan
    rule = resolved(rules(n)[name], *models(n, dtype))
    expected, bad = reference(rule, base, tuned, base, dtype)
    out, counted = delta_merge(rule, base, tuned, add=base, out_dtype=dtype)
    hosted, host_counted = host_merge(rule, base, tuned, base, dtype, 3)
    assert counted.tolist()[:5] == bad.tolist()[:5] == [1, 3, 0, 2, 0]
    assert counted.tolist() == bad.tolist() == host_counted
    assert torch.equal(torch.isfinite(out), torch.isfinite(expected))
    good = torch.isfinite(expected)
    assert torch.equal(out[good], expected[good]) and same_bits(out, hosted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_overflow_of_the_output_is_counted(dtype):
    base = torch.full((2000,), 3e4)
    tuned = [base * 2]
    tuned[0][7] = 3e38
    rule = DeltaRule(weights=(1.0,), scale=2.0)
    out, bad = delta_merge(rule, base, tuned, add=base, out_dtype=dtype)
    expected, expected_bad = reference(rule, base, tuned, base, dtype)
    assert torch.equal(out, expected) and bad.tolist() == expected_bad.tolist()
    assert bad[-1] == (2000 if dtype == torch.float16 else 1)


def test_rounding_of_every_float16_and_bfloat16():
    """Every value of both dtypes, its neighbours and the midpoints between, through the same cast as torch's."""
    for dtype in (torch.float16, torch.bfloat16):
        exact = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
        exact = exact[torch.isfinite(exact)]
        bits = exact.view(torch.int32)
        step = 2**12 if dtype == torch.float16 else 2**15
        for shift in (0, -1, 1, step - 1, step, step + 1):
            x = (bits + shift).view(torch.float32)
            x = x[torch.isfinite(x)]
            out, _ = host_merge(DeltaRule(weights=(1.0,)), None, [x], None, dtype)
            assert torch.equal(out, x.to(dtype) + 0), (dtype, shift)


def test_mask_share_independence_and_second_draw():
    index = torch.arange(1 << 20)
    for keep in (0.5, 0.9, 0.001, 3 * 2.0**-17):
        for key in (0, 12345, 2**64 - 1):
            kept = random_mask(keep, key, index)
            sigma = (keep * (1 - keep) / len(index)) ** 0.5
            assert abs(kept.double().mean().item() - keep) < 5 * sigma
    a, b = (random_mask(0.5, key, index).double() - 0.5 for key in (1, 2))
    assert abs((a * b).mean().item()) < 5 * 0.25 / len(index) ** 0.5  # two tasks
    assert abs((a[1:] * a[:-1]).mean().item()) < 5 * 0.25 / len(index) ** 0.5  # neighbours
    assert not random_mask(0.0, 1, index).any() and random_mask(1.0, 1, index).all()


def test_mask_of_a_tile_is_that_of_the_tensor_beyond_2_to_the_35():
    """Both halves of the counter count; a tile may start at any entry."""
    from pymerge import _C
    from pymerge.ops.native import delta_params

    x, start = torch.ones(3000), 2**35 - 1001
    for begin in (start, start + 3, start + 1000):
        out, params = torch.empty(3000), delta_params(DeltaRule(weights=(1.0,), keep=(3 * 2.0**-17 + 0.4,), keys=(9,)))
        _C.delta_merge(None, [(x.data_ptr(), "F32")], None, (out.data_ptr(), "F32"), 3000, begin, params)
        assert torch.equal(out, random_mask(3 * 2.0**-17 + 0.4, 9, begin + torch.arange(3000)).float())


@pytest.mark.parametrize("name", ["linear", "dare", "ties_mergekit", "window"])
def test_opcheck(name):
    base, tuned = models(600, torch.bfloat16)
    rule = resolved(rules(600)[name], base, tuned)
    arguments = merge_arguments(rule, tuned)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(
            torch.ops.pymerge.delta_merge.default, (base, tuned, base), {**arguments, "out_dtype": dtype}
        )
    empty = torch.empty(0)
    if name == "linear":
        torch.library.opcheck(
            torch.ops.pymerge.delta_merge.default, (None, [empty] * 3, None), {**arguments, "out_dtype": torch.float32}
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tuned": []}, "at least one"),
        ({"tuned": [torch.zeros(3)] * 2}, r"base is \[4\], tuned\[0\] is \[3\]"),
        ({"tuned": [torch.zeros(4), torch.zeros(4, dtype=torch.int32)]}, "tuned must be bfloat16.*got Int"),
        ({"weights": [1.0]}, r"weights must have one entry per tuned tensor \(2\), got 1"),
        ({"rescales": [1.0] * 3}, "rescales must have one entry"),
        ({"keep": [0.5, 0.5]}, "keep and keys, or neither"),
        ({"keep": [0.5, 1.5], "keys": [1, 2]}, "keep must be in 0..1, got 1.5"),
        ({"keep": [0.5], "keys": [1]}, "keep must have one entry"),
        ({"row_length": 3}, "row_length must divide 4, got 3"),
        ({"row_length": -1}, "row_length must divide 4, got -1"),
        ({"top_theta": torch.zeros(2, 1)}, "top_theta and top_index, or neither"),
        ({"top_theta": torch.zeros(2, 1), "top_index": torch.zeros(2, 1)}, "top_index int64"),
        ({"skip_theta": torch.zeros(1, 2), "skip_index": torch.zeros(1, 2, dtype=torch.int64)}, r"must be \[2, 1\]"),
        ({"tie_sign": 0}, "tie_sign must be 1 or -1"),
        ({"divisor": 0.0}, "divisor is 0"),
        ({"norm": "l2"}, "got 'l2'"),
        ({"norm": "max"}, "needs elect"),
        ({"out_dtype": torch.int8}, "out_dtype must be"),
        ({"add": torch.zeros(5)}, r"add is \[5\]"),
    ],
)
def test_bad_arguments(change, message):
    good = {"base": torch.zeros(4), "tuned": [torch.zeros(4)] * 2, "add": None, "out_dtype": torch.float32}
    good |= merge_arguments(DeltaRule(weights=(1.0, 1.0)), [torch.zeros(4)])
    torch.ops.pymerge.delta_merge(**good)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pymerge.delta_merge(**{**good, **change})


def test_the_mask_draws_are_philox4x32_7():
    """Counter 0, key 0 of the known-answer file of Random123 (philox4x32, 7 rounds)."""
    halves = draws(0, torch.arange(8), 0).tolist()
    words = [halves[2 * i] | halves[2 * i + 1] << 16 for i in range(4)]
    assert words == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
