"""`_C.delta_moments` against NumPy in float64, at every processor level that is here."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from pymerge import _C
from pymerge.engine.moments import FIRST_OCTAVE, OCTAVES, Moments
from tests.ops.cases import DTYPES, SIZES, buffer, models

EPS = 2.0**-53


def host(base, tuned, n):
    sums, counts = map(np.frombuffer, _C.delta_moments(buffer(base), [buffer(t) for t in tuned], n), (float, np.int64))
    return Moments.of(n, len(tuned), sums, counts), counts[-1 - len(tuned) :]


def reference(base, tuned) -> Moments:
    """The definition: float32 differences, everything else in float64."""
    w = base.float().numpy()
    d = np.stack([t.float().numpy() - w for t in tuned])
    wide, changed, signs = d.astype(float), d != 0, np.sign(d)
    octave = np.clip(np.floor(np.log2(np.maximum(abs(wide), 1e-300))) - FIRST_OCTAVE, 0, OCTAVES - 1).astype(int)
    total = np.zeros_like(w)
    for one in d:
        total = total + one
    return Moments(
        entries=w.size,
        base=float((w.astype(float) ** 2).sum()),
        l1_of_sum=float(abs(total.astype(float)).sum()),
        gram=wide @ wide.T,
        l1=abs(wide).sum(1),
        octaves=np.stack([np.bincount(row, minlength=OCTAVES) for row in octave]),
        both=(changed[:, None] & changed[None]).sum(-1),
        opposed=(signs[:, None] * signs[None] < 0).sum(-1),
        contested=int((changed.sum(0) > 1).sum()),
        conflicted=int(((signs > 0).any(0) & (signs < 0).any(0)).sum()),
    )


def assert_close(found: Moments, wanted: Moments) -> None:
    """Counts are equal; sums of n products differ by at most 2 n eps of the sum of their magnitudes."""
    for name in ("octaves", "both", "opposed"):
        assert np.array_equal(getattr(found, name), getattr(wanted, name)), name
    assert (found.contested, found.conflicted, found.entries) == (wanted.contested, wanted.conflicted, wanted.entries)
    bound = 2 * max(1, wanted.entries) * EPS
    assert abs(found.base - wanted.base) <= bound * wanted.base
    assert abs(found.l1_of_sum - wanted.l1_of_sum) <= bound * wanted.l1_of_sum
    assert (abs(found.l1 - wanted.l1) <= bound * wanted.l1).all()
    sizes = np.sqrt(np.outer(wanted.gram.diagonal(), wanted.gram.diagonal()))  # Cauchy-Schwarz
    assert (abs(found.gram - wanted.gram) <= bound * sizes).all()


@pytest.mark.parametrize("tasks", [1, 2, 3, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_definition(dtype, tasks):
    for n in (*SIZES, 63, 65):
        base, tuned = models(n, dtype, tasks)
        found, bad = host(base, tuned, n)
        assert_close(found, reference(base, tuned))
        assert not bad.any()


def test_dtypes_may_differ():
    base, tuned = models(5000, torch.bfloat16)
    tuned = [tuned[0].float(), tuned[1].half(), tuned[2]]
    assert_close(host(base, tuned, 5000)[0], reference(base, tuned))


def test_every_octave_has_its_bin():
    """Both edges of each bin, zeros of both signs, subnormals, and what is beyond the last bin."""
    edges = 2.0 ** torch.arange(-140, 5, dtype=torch.float64).float()
    below = torch.nextafter(edges, torch.zeros(()))
    tuned = torch.cat([edges, below, -edges, torch.tensor([0.0, -0.0])])
    base = torch.zeros_like(tuned)
    found, _ = host(base, [tuned], len(tuned))
    assert np.array_equal(found.octaves, reference(base, [tuned]).octaves)
    assert found.octaves.sum() == len(tuned)
    assert found.both[0, 0] == int((tuned != 0).sum())


def test_more_models_than_a_byte_counts():
    base = torch.zeros(130)
    tuned = [torch.full((130,), (-1.0) ** t) for t in range(200)]
    assert_close(host(base, tuned, 130)[0], reference(base, tuned))


def test_counts_what_is_not_finite():
    base, tuned = models(3000)
    base[5], tuned[1][7], tuned[1][2999] = float("nan"), float("inf"), float("-inf")
    assert list(host(base, tuned, 3000)[1]) == [1, 0, 2, 0]


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_levels_agree(level):
    """Every level counts the same; sums are of the same lanes in the same order, so they are the same bits."""
    code = (
        "import torch; from pymerge import _C; from tests.ops.cases import buffer, models\n"
        "b, t = models(70001, torch.bfloat16)\n"
        "print(_C.delta_moments(buffer(b), [buffer(x) for x in t], 70001)[0].hex()"
        ", _C.delta_moments(buffer(b), [buffer(x) for x in t], 70001)[1].hex())"
    )
    if level != "baseline" and not _C.cpu_features()[level]:
        pytest.skip(f"this processor has no {level}")
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYMERGE_CPU": level},
        capture_output=True,
        text=True,
        check=True,
    )
    base, tuned = models(70001, torch.bfloat16)
    sums, counts = _C.delta_moments(buffer(base), [buffer(t) for t in tuned], 70001)
    assert run.stdout.split() == [sums.hex(), counts.hex()]


def test_bad_arguments():
    x = torch.zeros(4)
    with pytest.raises(ValueError, match="at least one tensor"):
        _C.delta_moments(buffer(x), [], 4)
    with pytest.raises(ValueError, match="dtype must be BF16"):
        _C.delta_moments(buffer(x), [(buffer(x)[0], "I8")], 4)
