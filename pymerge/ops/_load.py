"""Loads the operator libraries, once, when the first operator module is imported."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent


def load_operators() -> None:
    """`_ops.so` must load; `_ops_cuda.so` should where torch has CUDA: without it the PyTorch references run there."""
    try:
        torch.ops.load_library(str(HERE / "_ops.so"))
    except OSError as error:
        raise ImportError(
            f"{HERE / '_ops.so'} is not built or does not load with torch {torch.__version__} ({error}). "
            "Build it in the source tree: pip install --no-build-isolation -e ."
        ) from error
    if torch.version.cuda is None:
        return
    try:
        torch.ops.load_library(str(HERE / "_ops_cuda.so"))
    except OSError as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"pymerge: no native CUDA kernels, PyTorch code runs on CUDA instead ({reason})", stacklevel=2)


def has_kernel(name: str, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"pymerge::{name}", device.upper())


load_operators()
