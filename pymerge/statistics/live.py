"""Statistics that come to be while they are used: a model runs over its samples as far as its moments are asked for."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymerge.checkpoint import Checkpoint
from pymerge.errors import InputError, MergeError
from pymerge.statistics.moments import Moments, rows_are_kept
from pymerge.statistics.observing import Streamable, call, mask_of
from pymerge.statistics.store import Statistics
from pymerge.statistics.stream import Finished, StreamingCollector, reader, weights_on_demand

DTYPE = torch.float32  # of the sums, as `observe` has it
STATES = 4  # hidden states of the widest input that a layer holds at once: gate, up, their product, and what is carried


class Stopped(Exception):
    """The run is not wanted any more."""


class Observation:
    """One model's run over one batch, in a thread of its own that waits before each distinct input until it may go on.

    held    moments of the modules that were reached and not released yet, by their names in the checkpoint
    rows    of all modules that were reached
    error   what ended the run
    needs   the merged tensor that the run waits for
    """

    forwards: ClassVar[int] = 1  # how often a layer is run

    def __init__(self, made: Streamable, checkpoint: Checkpoint, batch: Any, label: str) -> None:
        self.made, self.checkpoint, self.batch, self.label = made, checkpoint, batch, label
        self.read = reader(checkpoint)
        self.held: dict[str, Moments] = {}
        self.rows: dict[str, int] = {}
        self.error: MergeError | None = None
        self.needs: str | None = None
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None

    def start(self, wanted: Collection[str], changed: threading.Condition, threads: int) -> None:
        """Run up to the first input. wanted: the modules (names in the checkpoint) whose inputs are observed; changed:
        is told of every change; threads: numeric threads of the run."""
        self.held.clear()
        self.changed, self.error = changed, None
        self.allowed = self.ended = self.stopping = False
        modules = {name: m for name, m in self.made.modules.items() if self.made.names[name] in wanted}
        self.thread = threading.Thread(
            target=self._run, args=(modules, threads), name=f"observe {self.label}", daemon=True
        )
        self.waiting = False
        self.thread.start()

    @property
    def settled(self) -> bool:
        """Whether nothing happens until `go_on`: all modules that share the last input are known."""
        return self.ended or (self.waiting and not self.allowed)

    def go_on(self) -> None:
        """Observe one more distinct input, then wait again."""
        with self.changed:
            self.allowed = True
            self.changed.notify_all()

    def stop(self) -> None:
        """End the run and its thread; what is held stays so."""
        if self.thread is None:
            return
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        self.thread.join()
        self.thread = None

    def _run(self, modules: Mapping[str, nn.Module], threads: int) -> None:
        torch.set_num_threads(threads)  # of this thread: others have their own number
        made, collector = self.made, self.collector(modules)
        collector.mask = mask_of(self.batch)
        try:  # an input is summed before the module's weights are read
            with collector, weights_on_demand(made.module, self.load, made.stored), torch.inference_mode():
                call(made.module, self.batch)
        except (Finished, Stopped):
            pass
        except MergeError as error:
            self.error = type(error)(f"{self.label}: {error}")
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            self.error = InputError(f"{self.label}: the model does not run on its samples: {what}")
            self.error.__cause__ = error
        finally:
            with self.changed:
                self.ended = True
                self.changed.notify_all()

    def collector(self, modules: Mapping[str, nn.Module]) -> LiveCollector:
        return LiveCollector(self, modules)

    def load(self, name: str) -> Tensor:
        """In the run's thread: the weights that a module is about to run with."""
        if self.stopping:
            raise Stopped
        return self.read(name)

    def wait(self) -> None:
        """In the run's thread: stay until one more input may be observed."""
        with self.changed:
            self.waiting = True
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.allowed or self.stopping)
            self.waiting = self.allowed = False
            if self.stopping:
                raise Stopped

    def reached(self, module: str, moments: Moments) -> None:
        """In the run's thread: a module's input is known."""
        name = self.made.names[module]
        self.rows[name], self.held[name] = moments.rows, moments


class LiveCollector(StreamingCollector):
    """Waits before each distinct input; an input that is seen again after its moments were released is a new one."""

    def __init__(self, run: Observation, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(modules, DTYPE, self.reached)
        self.run = run
        self.moments: Moments | None = None  # of the input that is being looked at

    def sharer(self, x: Tensor) -> str | None:
        holder = super().sharer(x)
        self.moments = None if holder is None else self.run.held.get(self.run.made.names[holder])
        if self.moments is None:
            self.run.wait()
            return None
        return holder

    def reached(self, module: str, moments: Moments | None) -> None:
        moments = moments or self.moments
        assert moments is not None
        self.run.reached(module, moments)


@dataclass(frozen=True, kw_only=True)
class LiveStatistics(Statistics):
    """What `run` holds at the moment. Which modules there are, and their widths, is known before it runs; which of them
    share an input, only then.

    positions  largest number of rows of an input
    """

    live: ClassVar[bool] = True

    run: Observation = field(repr=False)
    widths: Mapping[str, int] = field(repr=False)
    positions: int

    def width(self, module: str) -> int:
        return self.widths[module]

    def share_input(self, modules: Sequence[str]) -> bool:
        """Of modules that were not reached: whether they may."""
        if not all(module in self.run.held for module in modules):
            return len({module in self for module in modules}) == 1
        return len({id(self.run.held[module]) for module in modules}) == 1

    def fingerprint(self) -> dict[str, Any]:
        return {"observed": self.header.data}

    @property
    def state_bytes(self) -> int:
        """Estimate of the hidden states that the run carries."""
        itemsize = max(p.element_size() for p in self.run.made.module.parameters())
        return STATES * self.positions * max(self.widths.values()) * itemsize

    @property
    def moment_bytes(self) -> int:
        """Of the widest input, kept; what is summed in takes twice that."""
        n = max(self.widths.values())
        return 4 * (self.positions * n if rows_are_kept(self.positions, n) else n * (n + 1) // 2)

    @property
    def flops(self) -> int:
        """Of a pass: the linear modules' products, and the moments as if no two of them shared an input."""
        matrices = sum(p.numel() for m in self.run.made.modules.values() for p in m.parameters())
        return self.positions * (2 * self.run.forwards * matrices + sum(n * n for n in self.widths.values()))

    @property
    def weight_bytes(self) -> tuple[int, int]:
        """Of the largest tensor (the embeddings), and of the largest matrix of an observed module."""
        sizes = {name: p.numel() * p.element_size() for name, p in self.run.made.module.named_parameters()}
        matrices = [sizes[f"{name}.weight"] for name in self.run.made.modules if f"{name}.weight" in sizes]
        return max(sizes.values()), max(matrices, default=0)


def live_statistics(
    checkpoint: Checkpoint, folder: Path, batch: Any, label: str, *, sequential: bool = False
) -> LiveStatistics:
    """Statistics of the model in a folder over one batch (keyword arguments), for a merge that observes it.

    label   what messages call the model
    sequential  layers are fed with what the merged layers before them make of the samples
    Raises  InputError (no config.json, no linear layers)"""
    from pymerge.statistics.behind import BehindMerged

    made = Streamable.of(checkpoint, folder)
    run = (BehindMerged if sequential else Observation)(made, checkpoint, batch, label)
    widths = {made.names[name]: input_width(module) for name, module in made.modules.items()}
    header = made.header(checkpoint, batch, {name: name for name in widths})
    rows = positions(batch, checkpoint.config or {})
    return LiveStatistics(header=header, held=run.held, rows=run.rows, run=run, widths=widths, positions=rows)


def input_width(module: nn.Module) -> int:
    """Features of a linear module's input."""
    if isinstance(module, nn.Linear):
        return module.in_features
    return module.embed_dim if isinstance(module, nn.MultiheadAttention) else module.weight.shape[0]  # type: ignore


def positions(batch: Any, config: Mapping[str, Any]) -> int:
    """Rows of a layer's input, padding counted: tokens, or patches of images."""
    vision = config.get("vision_config") or config
    patch = vision.get("patch_size") or 16
    patch = patch if isinstance(patch, int) else min(patch)
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]

    def counts() -> Iterator[int]:
        for x in tensors:
            if not x.is_floating_point():
                yield x.numel()
            elif x.dim() == 4:
                yield x.shape[0] * (math.ceil(x.shape[2] / patch) * math.ceil(x.shape[3] / patch) + 1)
            elif x.dim():
                yield x.numel() // max(1, x.shape[-1])

    return max(counts(), default=1)
