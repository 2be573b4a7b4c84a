"""The host module: checksums, files, checks of arguments, CPU levels."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from pymerge import _C, ops
from pymerge.ops.delta_rule import DeltaRule
from pymerge.ops.native import delta_params
from tests.ops.cases import buffer

LEVELS = ["baseline", "avx2", "avx512"]


def has_level(level: str) -> bool:
    return level == "baseline" or _C.cpu_features()[level]


def test_crc32c_known_vectors():
    """RFC 3720 B.4, and the check value of the catalogue of parametrised CRC algorithms."""
    assert _C.crc32c(b"123456789") == 0xE3069283
    assert _C.crc32c(bytes(32)) == 0x8A9136AA
    assert _C.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert _C.crc32c(bytes(range(32))) == 0x46DD794E
    assert _C.crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C
    assert _C.crc32c(b"") == 0


def test_crc32c_of_parts_and_addresses():
    data = np.frombuffer(random.Random(0).randbytes(100_001), np.uint8)
    whole = _C.crc32c(data)
    assert whole != zlib.crc32(data) and whole == _C.crc32c((data.ctypes.data, data.nbytes)) == _C.crc32c(
        bytearray(data)
    )
    for cut in (0, 1, 7, 4096, 12_288, 12_289, 99_999, 100_001):
        head, tail = bytes(data[:cut]), bytes(data[cut:])
        assert _C.crc32c(tail, _C.crc32c(head)) == whole
        assert _C.crc32c_combine(_C.crc32c(head), _C.crc32c(tail), len(tail)) == whole
    with pytest.raises(ValueError, match="length"):
        _C.crc32c((0, 5))
    with pytest.raises(ValueError, match="contiguous"):
        _C.crc32c(np.zeros((4, 4))[:, ::2])


def test_rename_exchange(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.mkdir()
    if _C.rename_exchange(str(a), str(b)):
        assert a.is_dir() and b.read_text() == "1"
    with pytest.raises(FileNotFoundError):
        _C.rename_exchange(str(a), str(tmp_path / "none"))


def test_count_nonfinite():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x = torch.randn(5000).to(dtype)
        assert _C.count_nonfinite(buffer(x), 5000) == (0, -1)
        x[[77, 3000, 4999]] = torch.tensor([torch.inf, torch.nan, -torch.inf], dtype=dtype)
        assert _C.count_nonfinite(buffer(x), 5000) == (3, 77)


def test_every_operator_is_native_on_the_cpu():
    assert all(runs["cpu"] == "native" for runs in ops.implementations().values())


def test_operators_and_host_module_do_not_import_torch():
    code = "import sys, pymerge.ops.native; assert 'torch' not in sys.modules; print(pymerge.ops.OPERATORS)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


BUFFERS = (None, 3, (1,), ("x", "F32"), (8, 3), (0, "F32"), (-1, "F32"), (2**64, "F32"), (64, "I8"), (64, "f32"))


@pytest.mark.parametrize("bad", BUFFERS[1:], ids=str)
def test_bad_buffers_raise(bad):
    x = torch.zeros(4)
    good, params = buffer(x), delta_params(DeltaRule(weights=(1.0,)))
    for base, tuned, add, out in (
        (bad, good, None, good),
        (None, bad, None, good),
        (None, good, bad, good),
        (None, good, None, bad),
    ):
        with pytest.raises((TypeError, ValueError, OverflowError)):
            _C.delta_merge(base, [tuned], add, out, 4, 0, params)
    with pytest.raises((TypeError, ValueError, OverflowError)):
        _C.count_nonfinite(bad, 4)


def test_bad_lists_raise():
    x = torch.zeros(4)
    one, params = buffer(x), delta_params(DeltaRule(weights=(1.0,)))
    calls = [
        lambda: _C.delta_merge(None, [], None, one, 4, 0, params),
        lambda: _C.delta_merge(None, [one, one], None, one, 4, 0, params),
        lambda: _C.delta_merge(None, [one], None, one, -1, 0, params),
        lambda: _C.delta_merge(None, [one], None, one, 4, -1, params),
        lambda: _C.delta_merge(None, [one], None, one, 2**62, 0, params),
        lambda: _C.delta_kth(None, [one], 4, [], 0),
        lambda: _C.delta_kth(None, [one], 4, [1], 3),
        lambda: _C.delta_kth(None, [one], 4, [1], -2),
        lambda: _C.delta_kth(None, [one], 4, [1], 0, [0.5], None),
        lambda: _C.delta_histogram(None, [one], 4, 0, None, None, None, np.zeros(5, np.int64)),
        lambda: _C.delta_histogram(None, [one], 4, 0, None, None, None, np.zeros(65536, np.int32)),
        lambda: _C.delta_histogram(None, [one], 4, 0, None, None, None, np.zeros((65536, 2), np.int64)[:, 0]),
        lambda: _C.delta_count_equal(None, [one], 4, 0, None, None, []),
        lambda: _C.delta_find_equal(None, one, 4, 0, None, None, 0.0, -1),
    ]
    for call in calls:
        with pytest.raises(ValueError):
            call()


def test_fuzzed_params_raise_or_are_made():
    """Every combination of plausible and wrong values either makes a DeltaParams or raises; none crashes."""
    choices = {
        "weights": [(1.0, 2.0), ()],
        "rescales": [None, (1.0,)],
        "keep": [None, (0.5, 0.5), (0.5, -1.0), (float("nan"), 0.5)],
        "keys": [None, (1, 2), (1,)],
        "row_length": [0, 4, -4],
        "top_theta": [None, bytes(8), bytes(16), bytes(7), b""],
        "top_index": [None, bytes(16), bytes(32), bytes(9)],
        "norm": ["none", "max", "L2"],
    }
    x, out, made = torch.zeros(8), torch.empty(8), 0
    for values in itertools.product(*choices.values()):
        arguments = dict(zip(choices, values, strict=True))
        try:
            params = _C.DeltaParams(**arguments)
            _C.delta_merge(None, [buffer(x)] * 2, None, buffer(out), 8, 0, params)
            made += 1
        except ValueError:
            continue
    assert made > 0
    with pytest.raises(ValueError, match="rows of 4 entries do not cover entry 7"):
        params = _C.DeltaParams(weights=(1.0,), row_length=4, top_theta=bytes(4), top_index=bytes(8))
        _C.delta_merge(None, [buffer(x)], None, buffer(out), 8, 0, params)


DIGEST = """
import torch
from pymerge import _C
from tests.ops.cases import *
crc = 0
for n in (1, 17, 4099, 241 * 40):
    for dtype in DTYPES:
        base, tuned = models(n, dtype)
        clean = [t.clone() for t in tuned]
        tuned[0][n // 2] = float("nan")
        for name, rule in sorted(rules(n).items()):
            rule = resolved(rule, base, clean)
            out, bad = host_merge(rule, base, tuned, base, dtype, 3)
            crc = _C.crc32c(str((name, n, dtype, bad)).encode(), _C.crc32c(out.view(torch.uint8).numpy(), crc))
            sums = _C.delta_l1(buffer(base), [buffer(t) for t in clean], n, 0, delta_params(rule))
            crc = _C.crc32c(sums, crc)
    crc = _C.crc32c(_C.delta_gram(buffer(base), [buffer(t) for t in clean], n), crc)
print(_C.cpu_level(), crc)
"""


def test_every_cpu_level_gives_the_same_bits():
    outputs = {}
    for level in filter(has_level, LEVELS):
        environment = {**os.environ, "PYMERGE_CPU": level, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
        run = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True
        )
        name, outputs[level] = run.stdout.split()
        assert name == level
    assert len(set(outputs.values())) == 1, outputs


def test_unknown_cpu_level_is_refused_at_import():
    run = subprocess.run(
        [sys.executable, "-c", "from pymerge import _C"],
        env={**os.environ, "PYMERGE_CPU": "sse9"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0 and "PYMERGE_CPU must be baseline, avx2, avx512 or amx, got 'sse9'" in run.stderr
