"""What the linear layers of structured.py's models see: a second moment for each distinct input, for RegMean.

In files beside the models, as float32 X^T X / N under the name of the first layer that has the input; q, k and v have
one. Strong directions that decay over a floor of noise, of each task its own; deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

VERSION = 1  # raise it when the bytes change
ROWS = 4096  # what N is said to be
STRONG = 4  # of n directions, n / 4 stand out

Grams = dict[str, torch.Tensor]


def holder(module: str) -> str:
    """The layer under whose name the input of this one is kept."""
    return module.replace(".k_proj", ".q_proj").replace(".v_proj", ".q_proj")


def write(root: Path, entries: Sequence[tuple[str, tuple[int, ...]]], tasks: int) -> None:
    """root/t1/inputs.VERSION.safetensors ... of the matrices among `entries`, unless they are there."""
    for task in range(1, tasks + 1):
        path = root / f"t{task}" / f"inputs.{VERSION}.safetensors"
        if not path.is_file():
            widths = {holder(name.removesuffix(".weight")): shape[1] for name, shape in entries if len(shape) == 2}
            moments = {name: moment(n, [VERSION, task, i]) for i, (name, n) in enumerate(widths.items())}
            save_file(moments, path)


def moment(n: int, seed: list[int]) -> np.ndarray:
    """[n, n] float32, positive definite."""
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((n, max(1, n // STRONG)), np.float32)
    factor *= (1.0 + np.arange(factor.shape[1], dtype=np.float32)) ** -0.5
    gram = factor @ factor.T
    gram[np.diag_indices(n)] += rng.uniform(0.05, 0.2, n).astype(np.float32)
    return gram


def load(root: Path, tasks: int) -> list[Grams]:
    """Of each task: name of a layer -> moment of its input; in memory of their own."""
    files = (root / f"t{task}" / f"inputs.{VERSION}.safetensors" for task in range(1, tasks + 1))
    return [{name: gram.clone() for name, gram in load_file(path).items()} for path in files]


def modules(grams: Grams) -> dict[str, str]:
    """Name of each layer -> the one that holds the moment of its input."""
    shared = [name.replace(".q_proj", f".{other}_proj") for name in grams for other in "kv" if ".q_proj" in name]
    return {name: holder(name) for name in (*grams, *shared)}


def statistics(grams: Grams) -> Any:
    """As `pymerge.observe` gives them."""
    from pymerge.linalg.packed import pack
    from pymerge.statistics.moments import Moments
    from pymerge.statistics.store import Header, Statistics

    held = {
        name: Moments(rows=ROWS, mean=torch.zeros(gram.shape[0]), triangle=pack(gram * ROWS))
        for name, gram in grams.items()
    }
    header = Header(model={}, data={}, modules=modules(grams))
    return Statistics(header=header, held=held, rows=dict.fromkeys(held, ROWS))


def fusion_bench_regmean(inputs: list[Grams], parameters: dict[str, Any]) -> Any:
    """FusionBench's RegMean, with these moments in place of its run over a dataset."""
    from fusion_bench.method.regmean.regmean import RegMeanAlgorithm

    class Given(RegMeanAlgorithm):
        _include_module_type = [torch.nn.Module]  # the layers here are plain modules that hold tensors

        def run(self, modelpool: Any) -> Any:
            modelpool.load_train_dataset = lambda name: None
            return super().run(modelpool)

        def get_regmean_weights(self, model_name: str, *_: Any, **__: Any) -> Grams:
            grams = inputs[int(model_name.removeprefix("t")) - 1]
            return {name: grams[held] for name, held in modules(grams).items()}

    return Given(num_regmean_examples=ROWS, exclude_param_names_regex=[], weight_transpose=True, **parameters)
