"""One merge by sd-mecha, in its own environment: python sd_mecha_worker.py METHOD ROOT OUT DTYPE THREADS

ROOT holds base, m1, m2, m3 with one safetensors file each. sd-mecha knows no Llama; without a configuration it takes a
model's keys as they are (its "structural" one). The step that adds a difference is taken from its module: the wrapper
of the same name in 1.1.8 fails on differences that are themselves results (AttributeError: identifier).
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sd_mecha
import torch
from sd_mecha.extensions.builtin.merge_methods.linear import add_difference


def task_arithmetic(base: Any, models: list[Any]) -> Any:
    merged = base
    for model in models:
        merged = add_difference(merged, sd_mecha.subtract(model, base), alpha=0.4)
    return merged


def ties(base: Any, models: list[Any]) -> Any:
    deltas = [sd_mecha.subtract(model, base) for model in models]
    return add_difference(base, sd_mecha.ties_sum(*deltas, k=0.25, vote_sgn=True), alpha=1.0)


def dare_ties(base: Any, models: list[Any]) -> Any:
    """apply_stock=True: in 1.1.8 that is what leaves Model Stock's factor out."""
    return sd_mecha.add_ties_with_dare(base, *models, probability=0.5, k=1.0, vote_sgn=True, apply_stock=True, seed=0)


RECIPES: dict[str, Callable[[Any, list[Any]], Any]] = {
    "linear": lambda _, models: sd_mecha.n_average(*models),
    "task_arithmetic": task_arithmetic,
    "slerp": lambda base, models: sd_mecha.slerp(base, models[0], alpha=0.4),
    "ties": ties,
    "dare_ties": dare_ties,
    "model_stock": lambda base, models: sd_mecha.n_model_stock(base, *models[:2]),
}


def main() -> None:
    method, root, out, dtype, threads = sys.argv[1:]
    base, *models = (sd_mecha.model(Path(root) / name / "model.safetensors") for name in ("base", "m1", "m2", "m3"))
    Path(out).mkdir(parents=True)
    sd_mecha.merge(
        RECIPES[method](base, models),
        output=Path(out) / "model.safetensors",
        output_dtype=getattr(torch, dtype),
        threads=int(threads),
    )


if __name__ == "__main__":
    main()
