"""Running a checkpoint that does not fit in memory: each module's weights are read when it runs and dropped after.

All samples go through the model in one batch, so every weight is read once and what is carried along is their hidden
states. The run ends when the last observed module has seen its input: heads, whose outputs can be the largest tensors
of all, never run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pymerge.checkpoint import TORCH_NAME, Checkpoint, safe_name
from pymerge.errors import InputError
from pymerge.statistics.collect import Collector
from pymerge.statistics.moments import Moments

Read = Callable[[str], Tensor]


class Finished(Exception):
    """The last observed module has seen its input."""


def load_libraries() -> None:
    """What making a model without weights takes: some 0.4 GB of program."""
    try:
        import accelerate  # noqa: F401
        import transformers.modeling_utils  # noqa: F401
    except ImportError:
        raise InputError(
            'streaming needs transformers and accelerate; install with: pip install "pymerge[hf]"'
        ) from None


def empty_model(cls: type, path: Path) -> nn.Module:
    """The architecture of a Hugging Face folder with parameters that take no memory; buffers are real."""
    load_libraries()
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    make = getattr(cls, "_from_config", None) or cls.from_config  # type: ignore[attr-defined]
    config.use_cache = False  # keys and values of all layers, for a pass that never asks for them again
    with init_empty_weights(include_buffers=False):
        return make(config)


def reader(checkpoint: Checkpoint) -> Read:
    """Loads tensors of a checkpoint by their names there; values of fp8 in the model's dtype."""

    def read(name: str) -> Tensor:
        if name not in checkpoint:
            raise InputError(
                f"{safe_name(name)}: the model's class has this parameter, the checkpoint has not: it cannot be "
                "streamed; observe it in memory"
            )
        tensor = checkpoint[name]
        return tensor.load().to(getattr(torch, TORCH_NAME[tensor.stored]))

    return read


def unit_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module's own forward uses: its direct ones; fused attention reads its children's too."""
    return dict(module.named_parameters(recurse=isinstance(module, nn.MultiheadAttention)))


@contextmanager
def weights_on_demand(model: nn.Module, read: Read, stored: Mapping[str, str]) -> Iterator[None]:
    """While entered, every module of `model` has its weights during its own forward, and only then.

    read    gives the tensor of a name in the checkpoint
    stored  parameter -> its name in the checkpoint"""
    handles: list[Any] = []
    for prefix, module in model.named_modules():
        empty = unit_of(module)
        if empty:
            full = {name: f"{prefix}.{name}" if prefix else name for name in empty}
            names = {name: stored.get(whole, whole) for name, whole in full.items()}
            handles.append(module.register_forward_pre_hook(loader(names, read)))
            handles.append(module.register_forward_hook(dropper(empty), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def loader(names: Mapping[str, str], read: Read) -> Any:
    def load(module: nn.Module, args: Any) -> None:
        for name, stored in names.items():
            put(module, name, nn.Parameter(read(stored), requires_grad=False))

    return load


def dropper(empty: Mapping[str, nn.Parameter]) -> Any:
    def drop(module: nn.Module, args: Any, output: Any) -> None:
        for name, parameter in empty.items():
            put(module, name, parameter)

    return drop


def put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    *path, last = name.split(".")
    for part in path:
        module = getattr(module, part)
    setattr(module, last, parameter)


class StreamingCollector(Collector):
    """A collector for one batch: hands out the moments of an input as soon as it has been seen.

    found  is told each module that is reached, with the moments of its input; None: it shares one that was handed out
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], dtype: torch.dtype, found: Callable[[str, Moments | None], None]
    ) -> None:
        super().__init__(modules, dtype)
        self.found, self.left = found, set(modules)

    def add(self, name: str, x: Tensor, transposed: bool) -> None:
        if name not in self.left:
            raise InputError(f"{name} runs more than once in a pass: it cannot be streamed; observe it in memory")
        super().add(name, x, transposed)
        self.left.discard(name)
        self.found(name, self.accumulators.pop(name).finish() if name in self.accumulators else None)
        if not self.left:
            raise Finished
