"""delta_l1, delta_gram, delta_signs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pymerge import _C
from pymerge.ops._arguments import selection_arguments, weight_arguments
from pymerge.ops.delta_gram import delta_gram, delta_gram_reference
from pymerge.ops.delta_l1 import delta_l1, delta_l1_reference
from pymerge.ops.delta_rule import DeltaRule
from pymerge.ops.delta_signs import delta_signs, delta_signs_reference
from pymerge.ops.native import delta_params
from tests.ops.cases import DTYPES, SIZES, buffer, models, resolved, rules

EPS = 2.0**-52


@pytest.mark.parametrize("name", ["linear", "dare", "window", "ties_mergekit"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_match_reference(name, dtype):
    for n in SIZES:
        base, tuned = models(n, dtype)
        rule = resolved(rules(n)[name], base, tuned)
        selection = selection_arguments(rule, base.device)
        norms = delta_l1_reference(base, tuned, **selection)
        # n additions of non-negative numbers: relative error at most n eps in either order
        assert ((delta_l1(rule, base, tuned) - norms).abs() <= 2 * n * EPS * norms).all()
        size = norms[:, 0].max() ** 2 if n else 0.0
        assert ((delta_gram(base, tuned) - delta_gram_reference(base, tuned)).abs() <= 2 * n * EPS * size).all()
        signs = delta_signs(rule, base, tuned)
        assert signs == delta_signs_reference(base, tuned, **weight_arguments(rule), **selection)
        hosted = _C.delta_signs(buffer(base), [buffer(t) for t in tuned], n, 0, delta_params(rule))
        assert hosted == signs


def test_sums_are_per_block_of_2_to_the_20_and_independent_of_tiling():
    n, block = (1 << 21) + 12345, 1 << 20
    base, tuned = models(n, torch.bfloat16, 2)
    params = delta_params(DeltaRule(weights=(1.0, 1.0), keep=(0.5, 0.5), keys=(1, 2)))

    def tile(low, high):
        buffers = [buffer(t[low:high]) for t in tuned]
        l1 = np.frombuffer(_C.delta_l1(buffer(base[low:high]), buffers, high - low, low, params))
        return l1, np.frombuffer(_C.delta_gram(buffer(base[low:high]), buffers, high - low))

    whole, parts = tile(0, n), [tile(i, min(n, i + block)) for i in range(0, n, block)]
    for kind in (0, 1):
        assert np.array_equal(whole[kind], np.concatenate([p[kind] for p in parts]))
    l1 = whole[0].reshape(3, 2, 2)
    truth = math.fsum((tuned[0].float() - base.float()).abs().tolist())
    assert abs(math.fsum(l1[:, 0, 0]) - truth) <= block * EPS * truth
    with pytest.raises(ValueError, match=r"multiple of 2\^20, got 5"):
        _C.delta_l1(buffer(base), [buffer(t) for t in tuned], 10, 5, params)


def test_opcheck():
    base, tuned = models(300, torch.bfloat16)
    rule = resolved(rules(300)["window"], base, tuned)
    selection = tuple(selection_arguments(rule, base.device).values())
    torch.library.opcheck(torch.ops.pymerge.delta_l1.default, (base, tuned, *selection))
    torch.library.opcheck(torch.ops.pymerge.delta_gram.default, (base, tuned))
    torch.library.opcheck(torch.ops.pymerge.delta_gram.default, (None, tuned))
    torch.library.opcheck(
        torch.ops.pymerge.delta_signs.default, (base, tuned, list(rule.weights), [1.0, 2.0, 3.0], *selection)
    )


def test_bad_arguments():
    x = [torch.zeros(4), torch.zeros(5)]
    with pytest.raises(RuntimeError, match=r"delta_gram: tuned is \[5\], tuned\[0\] is \[4\]"):
        torch.ops.pymerge.delta_gram(None, x)
    with pytest.raises(RuntimeError, match="weights must have one entry"):
        delta_signs(DeltaRule(weights=(1.0,)), None, [x[0], x[0]])
