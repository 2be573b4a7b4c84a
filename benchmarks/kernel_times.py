"""Wall time of operators on CPU tensors, against the times that were saved: reported, never a failure.

make kernel-times             a table, with the saved times where this machine's Python has some
make kernel-times ACCEPT=1    saves the times (benchmarks/results/kernel_times)

Models are three of 1M entries around a base; one thread. What may not grow is counted: `make instructions`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.bench_cuda import OPS, dare, merge, ties
from benchmarks.timing import models
from pymerge.ops.assign import assign
from pymerge.ops.cov_accumulate import cov_accumulate
from pymerge.ops.delta_gram import delta_gram
from pymerge.ops.finite_cast import finite_cast
from pymerge.ops.gram64 import gram64
from pymerge.ops.project_delta import project_delta
from pymerge.ops.sketch import sketch

SIDE = 1024


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def operators() -> dict[str, Callable[[], object]]:
    base, tuned = models(SIDE * SIDE, 3)
    matrix, matrices = base.view(SIDE, SIDE), [x.view(SIDE, SIDE) for x in tuned]
    x = torch.randn(SIDE, 256, generator=torch.Generator().manual_seed(0))
    basis, covariance = torch.linalg.qr(x[:, :64])[0], torch.zeros(256, 256)
    return {
        "linear": lambda: merge(base, tuned),
        "dare": lambda: dare(base, tuned),
        "ties": lambda: ties(base, tuned),
        "delta_kth": lambda: OPS.delta_kth(base, tuned[:1], [SIDE], 0, None, None),
        "delta_gram": lambda: delta_gram(base, tuned),
        "finite_cast": lambda: finite_cast(x, torch.bfloat16),
        "project_delta": lambda: project_delta(basis, matrix, matrices),
        "cov_accumulate": lambda: cov_accumulate(covariance, x),
        "gram64": lambda: gram64(x),
        "sketch": lambda: sketch(x, 64),
        "assign": lambda: assign(x[None, :256], True),
    }


OPERATORS = operators()


@pytest.mark.parametrize("name", OPERATORS)
def test_time(name, benchmark):
    benchmark.pedantic(OPERATORS[name], rounds=15, warmup_rounds=2)
