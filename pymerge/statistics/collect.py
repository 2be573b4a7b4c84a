"""Hooks on linear layers: each distinct input is accumulated once, without its padding."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pymerge.errors import InputError
from pymerge.statistics.moments import Accumulator

RECENT = 4  # inputs of the last modules: those that share one are called one after another


def linear_modules(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, nn.Module]:
    """The modules whose inputs are observed: Linear, GPT-2's Conv1D, fused multi-head attention."""
    found = {}
    for name, module in model.named_modules():
        kind = isinstance(module, nn.Linear | nn.MultiheadAttention) or type(module).__name__ == "Conv1D"
        if kind and wanted(name) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            found[name] = module
    return found


def stored_transposed(modules: Mapping[str, nn.Module], names: Mapping[str, str]) -> tuple[str, ...]:
    """The stored names of the modules whose weight is [in, out]."""
    return tuple(names[name] for name, module in modules.items() if type(module).__name__ == "Conv1D")


class Collector:
    """Accumulates the inputs of modules while it is entered.

    mask   bool [B, S] of the batch that is running: which positions are no padding; None: all of them
    """

    def __init__(self, modules: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
        self.modules, self.dtype = modules, dtype
        self.mask: Tensor | None = None
        self.holders: dict[str, str] = {}  # module -> the module whose accumulator has its input
        self.accumulators: dict[str, Accumulator] = {}
        self.recent: list[tuple[weakref.ref[Tensor], str]] = []
        self.handles: list[Any] = []

    def __enter__(self) -> Collector:
        for name, module in self.modules.items():
            self.handles.append(module.register_forward_pre_hook(self.hook(name), with_kwargs=True))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def hook(self, name: str) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            if x is not None:
                self.add(name, x, transposed=isinstance(module, nn.MultiheadAttention) and not module.batch_first)

        return seen

    def add(self, name: str, x: Tensor, transposed: bool) -> None:
        shared = self.sharer(x)
        holder = self.holders.setdefault(name, shared or name)
        if holder != name:
            if shared != holder:
                raise InputError(
                    f"{name} shared its input with {holder} in the first batch and does not now: observe it alone "
                    "(targets)"
                )
            return
        self.recent = [(weakref.ref(x), name), *self.recent[: RECENT - 1]]
        rows = without_padding(x.transpose(0, 1) if transposed and x.dim() == 3 else x, self.mask)
        self.accumulators.setdefault(name, Accumulator(name, self.dtype)).add(rows)

    def sharer(self, x: Tensor) -> str | None:
        """The module that was given this very input a moment ago; None: it is a new one."""
        return next((holder for ref, holder in self.recent if ref() is x), None)


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """[rows, n]. Inputs that are not laid out as [B, S, n] or [B S, n] (routed experts) are taken whole."""
    flat = x.reshape(-1, x.shape[-1])
    if mask is None or x.dim() < 2:
        return flat
    if x.shape[:-1] == mask.shape or flat.shape[0] == mask.numel():
        return flat[mask.reshape(-1).to(x.device)]
    return flat
