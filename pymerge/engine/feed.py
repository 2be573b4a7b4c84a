"""Merging while the models run over their samples: what is merged next is what the models have just reached.

All models go from one distinct input to the next in step; the matrices that it feeds are merged while the models go on,
and its moments are dropped when they are. Two inputs are in work at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint import TORCH_NAME, safe_name
from pymerge.engine.arena import Arena, Closed
from pymerge.engine.inputs import not_shared, shortened
from pymerge.engine.observing import IN_WORK
from pymerge.engine.plan import Item, Plan
from pymerge.errors import InputError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.engine.sink import Sink

Range = tuple[Item, int, int]  # item, first entry, entries
Group = tuple[str, ...]  # modules whose matrices are merged as one, in order


class Feed:
    """Puts ranges into the order in which the inputs of their layers become known."""

    def __init__(self, plan: Plan, arena: Arena, sink: Sink) -> None:
        self.plan, self.arena, self.sink = plan, arena, sink
        self.runs: list[Any] = [found.run for found in plan.observed]
        self.out: dict[str, int] = {}  # module whose matrix is in work -> number of its step
        self.written: dict[str, int] = {}  # bytes of the output's tensors, where the models run behind merged layers
        if plan.recipe.sequential:
            self.entries = {item.entry.name: item.entry for item in plan.items}
            self.written = {name: sum(size for _, size, _ in parts) for name, parts in sink.done.items()}
            for run in self.runs:
                run.is_merged, run.read_merged = self.is_written, self.read

    def order(self, ranges: Iterable[Range]) -> Iterator[Range | None]:
        """The ranges; None where what came before must not wait for what comes next.

        Runs the models over their samples as the ranges are asked for; `release` each when it is merged."""
        if not self.runs:
            yield from ranges
            return
        waiting: dict[str, Range] = {}
        for found in ranges:
            module = module_of(found[0])
            if module is None:
                yield found
            else:
                waiting[module] = found
        yield None
        if waiting:
            yield from self.sweep(waiting, grouped(waiting))

    def sweep(self, waiting: dict[str, Range], groups: dict[str, Group]) -> Iterator[Range | None]:
        """One pass of all models over their samples."""
        pending = {item.entry.name for item, _, _ in waiting.values()}

        def paused(run: Any) -> bool:  # waits for what is to come from here
            return run.settled or run.needs in pending

        for run in self.runs:
            run.start(list(waiting), self.arena.changed, self.plan.observing_threads)
            self.wait(lambda run=run: paused(run))  # one after the other: embeddings are the largest weights of all
        step = 0
        while not all(run.ended or run.needs in pending for run in self.runs):
            self.wait(lambda: len(set(self.out.values())) < IN_WORK)
            for run in self.runs:
                run.go_on()
            self.wait(lambda: all(map(paused, self.runs)))
            step += 1
            for group in dict.fromkeys(groups[module] for module in waiting):
                if all(module in run.held for run in self.runs for module in group):
                    self.check_join(group, waiting)
                    self.out |= dict.fromkeys(group, step)
                    pending.difference_update(waiting[module][0].entry.name for module in group)
                    yield from [waiting.pop(module) for module in group]
            yield None
        self.stop()
        yield from self.never_reached(waiting)

    # what runs behind merged layers read

    def wrote(self, name: str, nbytes: int) -> None:
        """Some bytes of a tensor have been written."""
        if self.plan.recipe.sequential:
            with self.arena.changed:
                self.written[name] = self.written.get(name, 0) + nbytes
                self.arena.changed.notify_all()

    def is_written(self, name: str) -> bool:
        """Whether a tensor is there, or never will be."""
        slot = self.plan.layout.slots.get(name)
        return slot is None or self.written.get(name, 0) >= slot.nbytes

    def read(self, name: str) -> Tensor | None:
        """A merged tensor; None: the output has none of that name."""
        import torch

        entry = self.entries.get(name)
        if entry is None:
            return None
        flat = torch.empty(self.plan.layout.slots[name].nbytes, dtype=torch.uint8)
        self.sink.read_into(name, flat.numpy().data)
        return flat.view(getattr(torch, TORCH_NAME[entry.dtype])).reshape(entry.shape)

    # the rest

    def check_join(self, group: Group, waiting: dict[str, Range]) -> None:
        """Which modules share an input is known only now."""
        if not all(found.share_input(group) for found in self.plan.observed):
            raise RecipeError(not_shared([waiting[module][0].entry.name for module in group]))

    def never_reached(self, waiting: dict[str, Range]) -> Iterator[Range]:
        """Matrices of modules that the models have and do not run are merged as those without statistics."""
        for module in waiting:
            if lacking := [run.label for run in self.runs if module not in run.rows]:
                if len(lacking) < len(self.runs):
                    raise InputError(f"{', '.join(lacking)}: does not run {safe_name(module)}, the other models do")
        if waiting:
            names = [safe_name(item.entry.name) for item, _, _ in waiting.values()]
            if not all(item.entry.adds for item, _, _ in waiting.values()):  # at what scale they go is planned
                raise InputError(f"their modules do not run: {shortened(names)}: exclude them to search over the scale")
            note = f"matrices of modules that do not run, merged without inputs: {len(names)}: {shortened(names)}"
            if note not in self.plan.notes:
                self.plan.notes.append(note)
        for item, first, count in waiting.values():
            yield replace(item, entry=replace(item.entry, inputs=())), first, count

    def release(self, items: Iterable[Item]) -> None:
        """The inputs of these are not asked for again in this sweep."""
        if not self.runs:
            return
        with self.arena.changed:
            for module in filter(None, map(module_of, items)):
                for run in self.runs:
                    run.held.pop(module, None)
                self.out.pop(module, None)
            self.arena.changed.notify_all()

    def wait(self, until: Callable[[], bool]) -> None:
        """Until something is so, a model's run has failed, or the merge is being stopped."""
        with self.arena.changed:
            self.arena.changed.wait_for(
                lambda: self.arena.closed or until() or any(run.error is not None for run in self.runs)
            )
        for run in self.runs:
            if run.error is not None:
                raise run.error
        if self.arena.closed:
            raise Closed("stopped")

    def stop(self) -> None:
        for run in self.runs:
            run.stop()


def module_of(item: Item) -> str | None:
    """The module whose input the item's steps ask for."""
    return item.entry.inputs[0].module if item.entry.inputs else None


def grouped(waiting: dict[str, Range]) -> dict[str, Group]:
    """Module -> those that it is merged with, itself included."""
    joins: dict[int, list[str]] = {}
    for module, (item, _, _) in waiting.items():
        if item.entry.join is not None:
            joins.setdefault(item.entry.join[0], []).append(module)
    groups = {module: tuple(modules) for modules in joins.values() for module in modules}
    return {module: groups.get(module, (module,)) for module in waiting}
