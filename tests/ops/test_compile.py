"""torch.compile with its default backend: one graph, and results of the operator on each side of generated code."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch

from pymerge.ops import OPERATORS
from pymerge.ops._arguments import selection_arguments, weight_arguments
from tests.ops.cases import merge_arguments, models, resolved, rules

OPS = torch.ops.pymerge
F32 = torch.float32
for _name in OPERATORS:
    importlib.import_module(f"pymerge.ops.{_name}")


def moments(x):
    cov = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
    OPS.cov_accumulate(cov, x, 0.5)
    return cov + 1


def of_models(operator: str) -> Callable:
    """The operators on a base and its children, with the arguments that `ties_mergekit` gives them."""
    base, tuned = models(300)
    rule = resolved(rules(300)["ties_mergekit"], base, tuned)
    selection, weights = selection_arguments(rule, base.device), weight_arguments(rule)
    everything = merge_arguments(rule, tuned)
    calls = {
        "delta_gram": lambda b, t: OPS.delta_gram(b, t),
        "delta_histogram": lambda b, t: OPS.delta_histogram(b, t, None, None, None),
        "delta_kth": lambda b, t: OPS.delta_kth(b, t, [3, 5, 0], 0, None, None),
        "delta_l1": lambda b, t: OPS.delta_l1(b, t, **selection),
        "delta_merge": lambda b, t: OPS.delta_merge(b, t, b, **everything, out_dtype=F32),
        "delta_signs": lambda b, t: OPS.delta_signs(b, t, **weights, **selection),
    }
    return calls[operator]


CASES: dict[str, Callable] = {
    "assign": lambda x: OPS.assign(x[None].abs(), True, None, None),
    "cov_accumulate": moments,
    "finite_cast": lambda x: OPS.finite_cast(x * 1e38, torch.float16),
    "gram64": OPS.gram64,
    "project_delta": lambda x: OPS.project_delta(x[:, :3], x, [x + 1, x * 2], "fp32"),
    "projection_stats": lambda x: OPS.projection_stats(x[:, :3], x[:3], x, [x + 1, x * 2], "fp32"),
    "sketch": lambda x: OPS.sketch(x, 5, "gaussian", 3),
}


def doubled(result) -> list[torch.Tensor]:
    return [y * 2 for y in (result if isinstance(result, tuple) else (result,))]


def around(operator: str) -> Callable:
    if operator in CASES:
        return lambda x: doubled(CASES[operator](x * 2 + 1))
    call = of_models(operator)
    return lambda base, *tuned: doubled(call(base * 2, [x * 2 for x in tuned]))


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_to_one_graph_with_the_default_backend(operator):
    inputs = [torch.randn(9, 12, generator=torch.Generator().manual_seed(0))]
    if operator not in CASES:
        base, tuned = models(300)
        inputs = [base, *tuned]
    run = around(operator)
    want, got = run(*inputs), torch.compile(run, fullgraph=True)(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
