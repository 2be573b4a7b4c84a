"""Calls one operator with arguments that fit it, some of them replaced by random ones of the types in its schema.

Run as a process of its own, because what it looks for kills processes:

    python operator_fuzz.py OPERATOR CASES SEED      # prints {"returned": n, "refused": n}; the last case is on stderr
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
from typing import Any

import torch

import pymerge.ops._load  # noqa: F401  loads the operators

ADDRESS_SPACE = 12 << 30  # bytes: what asks for more fails to allocate, and does not swap
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
ODD_DTYPES = (torch.complex64, torch.float8_e4m3fn, torch.int16)
SIZES = (0, 1, 2, 3, 5, 8, 17, 64)
INTEGERS = (0, 1, 2, 3, 5, 8, 64, -1, -(2**63), 2**31, 2**32 + 1, 2**62)
NUMBERS = (0.0, 1.0, 0.5, -1.0, 1e-30, 1e38, float("nan"), float("inf"), -float("inf"))
WORDS = ("float32", "float64", "fp32", "bf16x3", "sum", "mean", "elected", "gaussian", "sparse_sign", "", "\0", "x")


class Case:
    """One call: m x n matrices of one dtype of T tasks, and what differs from a call that fits."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.sizes = self.random.choices(SIZES, k=3)
        self.dtype = self.random.choice(DTYPES[:4])
        self.tasks = self.random.choice((1, 2, 3))
        self.shape = self.sizes[:2]

    def arguments(self, operator: Any) -> dict[str, Any]:
        fitting = self.fitting(operator._schema.name.removeprefix("pymerge::"))
        odd = self.random.choice((0.0, 0.1, 0.4))
        drawn = {
            a.name: self.argument(a.name, str(a.type)) for a in operator._schema.arguments if self.random.random() < odd
        }
        return fitting | drawn

    def fitting(self, name: str) -> dict[str, Any]:
        """Arguments of a call that the operator takes."""
        (m, n), tasks, width = self.shape, self.tasks, self.sizes[2]
        rows, like = self.random.choice((0, n)), self.random.random
        cuts = (tasks, m if rows else 1)
        base, tuned = self.plain(m, n), [self.plain(m, n) for _ in range(tasks)]
        masks: dict[str, Any] = {"keep": None, "keys": None}
        if like() < 0.3:
            masks = {"keep": [0.5] * tasks, "keys": list(range(tasks))}
        cut = {"top_theta": torch.ones(cuts), "top_index": torch.zeros(cuts, dtype=torch.int64)}
        cut |= {"skip_theta": torch.full(cuts, 2.0), "skip_index": torch.zeros(cuts, dtype=torch.int64)}
        selection = {"row_length": rows, **masks, **(cut if like() < 0.5 else dict.fromkeys(cut))}
        weights = {"weights": [1.0] * tasks, "rescales": None}
        merged = {"add": base, "scale": 1.0, "divisor": 1.0, "elect": like() < 0.5, "tie_sign": 1, "norm": "none"}
        projected = {"basis": torch.zeros(m, width), "base": base, "tuned": tuned, "precision": "fp32"}
        deltas: dict[str, Any] = {"base": base, "tuned": tuned}
        calls = {
            "delta_merge": deltas | weights | selection | merged | {"out_dtype": self.dtype},
            "delta_kth": deltas | masks | {"ranks": [1] * tasks, "row_length": rows},
            "delta_histogram": deltas | masks | {"prefix": None},
            "delta_l1": deltas | selection,
            "delta_gram": deltas,
            "delta_signs": deltas | weights | selection,
            "project_delta": projected,
            "projection_stats": projected | {"reference": torch.zeros(width, n)},
            "finite_cast": {"x": torch.zeros(m, n), "dtype": self.dtype},
            "cov_accumulate": {"cov": torch.zeros(n, n), "x": base, "alpha": 1.0},
            "gram64": {"x": base},
            "sketch": {"a": base, "width": width, "kind": "gaussian", "seed": 0},
            "assign": {"score": torch.zeros(1, m, n), "maximize": True, "prices": None, "tolerance": None},
        }
        return calls[name]

    def plain(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.random.randrange(2**31))
        return torch.randint(-3, 4, shape, generator=generator).to(self.dtype)

    def argument(self, name: str, kind: str) -> Any:
        if name.endswith("dtype") and kind == "int":  # so the schema calls a ScalarType
            return self.random.choice((self.dtype, *DTYPES, *ODD_DTYPES))
        return self.value(kind)

    def value(self, kind: str) -> Any:
        if kind.startswith("Optional["):
            return None if self.random.random() < 0.5 else self.value(kind[9:-1])
        if kind.startswith("List["):
            count = self.tasks if self.random.random() < 0.9 else self.random.choice((0, 1, 7))
            return [self.value(kind[5:-1]) for _ in range(count)]
        draw = {
            "Tensor": self.tensor,
            "int": lambda: self.random.choice((*self.sizes, self.random.choice(INTEGERS))),
            "float": lambda: self.random.choice(NUMBERS),
            "bool": lambda: self.random.random() < 0.5,
            "str": lambda: self.random.choice(WORDS),
        }
        return draw[kind]()

    def tensor(self) -> torch.Tensor:
        shape = (
            self.shape if self.random.random() < 0.7 else self.random.choices(self.sizes, k=self.random.randrange(5))
        )
        dtype = self.dtype if self.random.random() < 0.7 else self.random.choice((*DTYPES, *ODD_DTYPES))
        if self.random.random() < 0.05:
            return torch.empty(shape, dtype=dtype, device="meta")
        values = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(self.random.randrange(2**31)))
        tensor = values.to(torch.float32).to(dtype)
        how = self.random.random()
        if how < 0.1 and tensor.dim() > 1:
            return tensor.mT
        if how < 0.2 and tensor.dim() > 0:
            return tensor[..., ::2]
        if how < 0.25:
            return tensor[:1].expand(shape) if tensor.dim() and tensor.shape[0] else tensor
        return tensor


def main(name: str, cases: int, seed: int) -> dict[str, int]:
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # which maps terabytes, and limits allocations by itself
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    operator = getattr(torch.ops.pymerge, name).default
    counts = {"returned": 0, "refused": 0}
    for number in range(cases):
        case = Case(seed * 1_000_003 + number)
        arguments = case.arguments(operator)
        print(f"{name} case {number} of seed {seed}", file=sys.stderr, flush=True)
        try:
            operator(**arguments)
            counts["returned"] += 1
        except Exception:  # any exception is an answer; only a crash is none
            counts["refused"] += 1
    return counts


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
