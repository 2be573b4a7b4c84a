"""Loads the operator libraries, once, when the first operator module is imported."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from pymerge.ops import _nvrtc

HERE = Path(__file__).resolve().parent.parent


def load_operators() -> str:
    """`_ops.so` must load; `_ops_cuda.so` should where torch has CUDA. Without it CuPy compiles the same kernels, or,
    where there is none, the PyTorch references run. Returns what CUDA has: native, nvrtc or reference."""
    try:
        torch.ops.load_library(str(HERE / "_ops.so"))
    except OSError as error:
        raise ImportError(
            f"{HERE / '_ops.so'} is not built or does not load with torch {torch.__version__} ({error}). "
            "Build it in the source tree: pip install --no-build-isolation -e ."
        ) from error
    if torch.version.cuda is None:
        return "reference"
    try:
        torch.ops.load_library(str(HERE / "_ops_cuda.so"))
    except OSError as error:
        if _nvrtc.connect():
            return "nvrtc"
        warnings.warn(
            f"pymerge: no native CUDA kernels, PyTorch code runs on CUDA instead ({str(error).splitlines()[0]}). "
            'With CuPy they are compiled when they are first used: pip install "pymerge[cuda]"',
            stacklevel=2,
        )
        return "reference"
    return "native"


def has_kernel(name: str, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"pymerge::{name}", device.upper())


def implementation(name: str, device: str) -> str:
    """native, nvrtc (CUDA only: kernels compiled at first use) or reference."""
    return "reference" if not has_kernel(name, device) else CUDA if device == "cuda" else "native"


CUDA = load_operators()
