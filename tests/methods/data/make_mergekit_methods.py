"""What mergekit 0.1.5 makes of a few small tensors with the methods that have no golden files.

python tests/methods/data/make_mergekit_methods.py   in an environment that has mergekit 0.1.5: writes
mergekit_methods.safetensors: `in.NAME` float32 [4, ...], the base and three models; `out.K` the merge of case K, whose
method, input and parameters are in the metadata.
"""

import json
from pathlib import Path
from typing import Any

import torch
from mergekit.merge_methods.api import merge_tensors
from safetensors.torch import save_file
from torch import Tensor

OUT = Path(__file__).parent / "mergekit_methods.safetensors"
PAIRS = ("nearswap", "arcee_fusion")  # the base and one model
CASES: list[tuple[str, dict[str, Any]]] = [
    ("sce", {}),
    ("sce", {"select_topk": 0.3}),
    ("sce", {"select_topk": 0.0}),
    ("nearswap", {"t": 0.0}),
    ("nearswap", {"t": 0.01}),
    ("nearswap", {"t": 5e-7}),
    ("arcee_fusion", {}),
    ("ram", {}),
    ("ram", {"epsilon": 0.02}),
    ("ramplus_tl", {}),
    ("ramplus_tl", {"r": 0.5, "alpha": 3.0, "epsilon": 0.02}),
]


def around(base: Tensor, size: float, g: torch.Generator) -> Tensor:
    """The base and three models that have something in common."""
    common = torch.randn(base.shape, generator=g)
    tuned = [base + size * (t + 1) * (common + torch.randn(base.shape, generator=g)) for t in range(3)]
    return torch.stack([base, *tuned])


def inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)
    matrix = torch.randn(10, 13, generator=g)
    # Sixteenths up to 3/16: many zeros, many changes of one size; sums are exact.
    steps = torch.randint(-3, 4, (3, 12, 11), generator=g) / 16
    return {
        "matrix": around(matrix, 0.02, g),
        "small": around(matrix, 1e-5, g),
        "bfloat16": around(matrix, 0.02, g).bfloat16().float(),
        "vector": around(torch.randn(37, generator=g), 0.02, g),
        "one": around(torch.randn(1, generator=g), 0.02, g),
        "column": around(torch.randn(9, 1, generator=g), 0.02, g),
        "filters": around(torch.randn(3, 2, 3, 3, generator=g), 0.02, g),
        "steps": torch.cat([torch.ones(1, 12, 11), 1 + steps]),
        "equal": torch.stack([matrix, *[matrix + 0.25] * 3]),
        "unchanged": torch.stack([matrix] * 4),
    }


def main() -> None:
    tensors, cases = inputs(), []
    saved = {f"in.{name}": stack for name, stack in tensors.items()}
    for name, stack in tensors.items():
        for method, parameters in CASES:
            if name == "steps" and parameters.get("select_topk", 1.0) not in (0.0, 1.0):
                continue  # equal variances: which of them are kept is up to a sort that is not stable
            models = [t.clone() for t in (stack[:2] if method in PAIRS else stack)]
            # In float32 the divergence of a row that hardly changed is rounding noise (input "small").
            dtype = torch.float64 if method == "arcee_fusion" else torch.float32
            merged = merge_tensors(models, method, parameters=parameters, base_index=0, dtype=dtype)
            saved[f"out.{len(cases)}"] = merged.float().clone()
            cases.append({"method": method, "input": name, "parameters": parameters})
    save_file(saved, OUT, metadata={"cases": json.dumps(cases), "mergekit": "0.1.5"})


if __name__ == "__main__":
    main()
