"""Runs in which each block of a model is fed with what the merged blocks before it make of the samples (RegMean++)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymerge.checkpoint import TORCH_NAME
from pymerge.errors import InputError
from pymerge.statistics.live import LiveCollector, Observation, Stopped
from pymerge.statistics.stream import loader, unit_of


class Seen(Exception):
    """All inputs of a block that are asked for are known."""


def blocks_of(model: nn.Module, observed: Iterable[str]) -> dict[str, nn.Module]:
    """The outermost entries of module lists that contain observed modules: a transformer's layers."""
    observed, found = list(observed), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{block}.") for block in found):
            entries = {f"{name}.{i}": entry for i, entry in enumerate(module)}
            found |= {at: e for at, e in entries.items() if any(o.startswith(f"{at}.") for o in observed)}
    return found


class BehindMerged(Observation):
    """Each block runs with the model's weights, which is observed, then with the merged ones, whose outputs go on. What
    is outside of all blocks runs with merged weights alone.

    is_merged    whether a tensor of the merged model (by its name in the checkpoint) can be read, or will never be
    read_merged  reads it; None: there is none. Both are set before the run is started.
    """

    forwards: ClassVar[int] = 2
    is_merged: Callable[[str], bool]
    read_merged: Callable[[str], Tensor | None]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.blocks = blocks_of(self.made.module, self.made.modules)
        self.own = False  # whether the model's weights are used

    def collector(self, modules: Mapping[str, nn.Module]) -> LiveCollector:
        return BlockCollector(self, modules)

    def load(self, name: str) -> Tensor:
        if not self.own:
            self.await_merged(name)
            merged = self.read_merged(name)
            if merged is not None:
                return merged.to(getattr(torch, TORCH_NAME[self.checkpoint[name].dtype]))
        return super().load(name)

    def await_merged(self, name: str) -> None:
        with self.changed:
            self.needs = name
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.is_merged(name) or self.stopping)
            self.needs = None
            if self.stopping:
                raise Stopped


class BlockCollector(LiveCollector):
    """Observes blocks while they run with their model's weights, all else whenever it runs."""

    run: BehindMerged

    def __init__(self, run: BehindMerged, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(run, modules)
        self.block_of = {name: block for name in modules for block in run.blocks if name.startswith(f"{block}.")}

    def __enter__(self) -> BlockCollector:
        super().__enter__()
        for name, block in self.run.blocks.items():
            block.forward = self.twice(name, block)
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        for block in self.run.blocks.values():
            del block.forward

    def twice(self, name: str, block: nn.Module) -> Callable[..., Any]:
        """A block's forward."""
        forward, run, calls = block.forward, self.run, []
        direct = {parameter: f"{name}.{parameter}" for parameter in unit_of(block)}
        load = loader({parameter: run.made.stored.get(whole, whole) for parameter, whole in direct.items()}, run.load)

        def carried(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) > 1:
                raise InputError(f"{name} runs more than once in a pass: it cannot be merged layer after layer")
            if self.left_in(name):
                run.own = True
                try:
                    load(block, None)
                    forward(*args, **kwargs)
                except Seen:
                    pass
                finally:
                    run.own = False
                load(block, None)
            return forward(*args, **kwargs)

        return carried

    def left_in(self, block: str) -> bool:
        return any(self.block_of.get(name) == block for name in self.left)

    def add(self, name: str, x: Tensor, transposed: bool) -> None:
        block = self.block_of.get(name)
        if block is not None and not self.run.own:
            return
        super().add(name, x, transposed)
        if block is not None and not self.left_in(block):
            raise Seen
