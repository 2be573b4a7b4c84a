"""A merge of models in memory: the same plan and the same walk as on disk, with tensors as the sink."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from pymerge.checkpoint import TORCH_NAME
from pymerge.engine.check import Entry
from pymerge.engine.execute import Executor, Stop
from pymerge.engine.local import open_inputs, settled
from pymerge.engine.plan import Options
from pymerge.engine.progress import make_progress
from pymerge.errors import InputError, RecipeError
from pymerge.recipe import Recipe


class MemorySink:
    """Output tensors, allocated as planned."""

    done: Mapping[str, Sequence[tuple[int, int, int]]] = {}

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.bytes: dict[str, memoryview] = {}
        for entry in entries:
            if entry.name not in self.tensors:
                tensor = torch.empty(entry.shape, dtype=getattr(torch, TORCH_NAME[entry.dtype]))
                self.tensors[entry.name] = tensor
                self.bytes[entry.name] = tensor.reshape(-1).view(torch.uint8).numpy().data

    def forget(self, name: str) -> None:
        """Nothing was ever finished before."""

    def read_into(self, name: str, view: memoryview) -> None:
        view[:] = self.bytes[name]

    def write(self, name: str, start: int, view: memoryview, crc: int, facts: Mapping[str, Any]) -> None:
        self.bytes[name][start : start + len(view)] = view


def merge_in_memory(recipe: Recipe, options: Options | None = None) -> Any:
    """A new state dict on the CPU, or a new module where modules came in. The recipe's models are not touched."""
    options = options or Options()
    if what := recipe.combine_class.beside:
        raise RecipeError(
            f"{recipe.method} leaves {what} beside the merged model: give folders, and out= for the result"
        )
    first = (recipe.base or recipe.models[0]).value
    if recipe.other_rows and not isinstance(first, Mapping):
        raise RecipeError("relax: vocabulary: truncate: the result has other rows than the modules: give state dicts")
    with ExitStack() as stack:
        _, plan = settled(recipe, open_inputs(recipe, options, stack), options)
        sink = MemorySink([item.entry for item in plan.items])
        with make_progress(plan.read_bytes, options.progress, len(plan.layout.slots)) as progress:
            Executor(
                plan, sink, threads=options.thread_count, device=options.device, progress=progress, stop=Stop()
            ).run()
    if isinstance(first, Mapping):
        return sink.tensors
    merged = copy.deepcopy(first)
    wrong = merged.load_state_dict(sink.tensors, strict=False)
    if wrong.missing_keys or wrong.unexpected_keys:
        raise InputError(
            f"the merged tensors do not fit the module: missing {wrong.missing_keys}, extra {wrong.unexpected_keys}"
        )
    return merged
