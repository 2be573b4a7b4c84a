"""How alike the units of two models are in what they compute on the same samples: streamed, shifted moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pymerge.align.groups import Spec, Tap, View
from pymerge.align.match import Blocks, UnitSet, blocks_of
from pymerge.align.moments import folded, moments, similarities
from pymerge.align.permutations import positions
from pymerge.errors import InputError, NonFinite
from pymerge.statistics.collect import without_padding
from pymerge.statistics.observe import call, mask_of


@dataclass
class Seen:
    """The sums of one set of units: samples of all its taps together.

    shift   of each model, [n]: the mean over the anchor's and the model's first samples, so that little is lost in
            float32; correlations do not change with it
    first, second   of each model, float64 [n]: sums and sums of squares of what is left
    products  view -> of each model but the anchor, float32 [n, n] (r n for a shared view)
    count   samples a unit
    """

    blocks: Blocks
    unit_set: UnitSet
    shift: dict[int, Tensor] = field(default_factory=dict)
    first: dict[int, Tensor] = field(default_factory=dict)
    second: dict[int, Tensor] = field(default_factory=dict)
    products: dict[View, dict[int, Tensor]] = field(default_factory=dict)
    count: dict[int, int] = field(default_factory=dict)

    def shifted(self, x: Tensor, view: View, t: int) -> Tensor:
        """Samples [S, n] (r n for the shared view) less the shift, which the first of them set."""
        shared, r = view == self.unit_set.shared, self.blocks.queries
        if t not in self.shift:
            mean = x.mean(0)
            self.shift[t] = folded(self.blocks, mean) / r if shared else mean
            self.first[t] = self.second[t] = torch.zeros(len(self.shift[t]), dtype=torch.float64, device=x.device)
        shift = self.shift[t]
        if shared:
            shift = shift.view(self.blocks.count, 1, -1).expand(-1, r, -1).reshape(-1)
        return x - shift

    def add(self, x: Tensor, view: View, t: int) -> Tensor:
        """Adds float32 samples of one model to its moments; returns them shifted."""
        x = self.shifted(x, view, t)
        sums = x.sum(0, dtype=torch.float64), x.square().sum(0, dtype=torch.float64)
        shared = view == self.unit_set.shared
        self.first[t] = self.first[t] + (folded(self.blocks, sums[0]) if shared else sums[0])
        self.second[t] = self.second[t] + (folded(self.blocks, sums[1]) if shared else sums[1])
        self.count[t] = self.count.get(t, 0) + len(x) * (self.blocks.queries if shared else 1)
        return x

    def add_products(self, anchor: Tensor, x: Tensor, view: View, t: int) -> None:
        of_view = self.products.setdefault(view, {})
        if t not in of_view:
            of_view[t] = x.new_zeros(x.shape[1], x.shape[1])
        of_view[t].addmm_(anchor.T, x)

    def scores(self, t: int) -> dict[View, Tensor]:
        """Correlations of the anchor's units with those of model t."""
        one, other = (moments(self.count[m], self.first[m].cpu(), self.second[m].cpu(), False) for m in (0, t))
        grams = {view: of_view.pop(t).cpu() for view, of_view in self.products.items()}
        return similarities(self.blocks, self.unit_set, grams, (one, other))


class PairCollector:
    """Taps on models that see the same batches one after another, the anchor (number 0) first.

    Holds the anchor's activations of one batch, and for each tapped view and model n^2 float32.

    modules  of each model by the names that the spec uses"""

    def __init__(self, spec: Spec, modules: Sequence[Mapping[str, nn.Module]]) -> None:
        self.modules = modules
        self.seen: dict[tuple[str, View], Seen] = {}  # by group and base view
        self.taps: list[tuple[Tap, Seen, int]] = []  # with the number of units
        for group in spec.groups:
            blocks = blocks_of(group)
            for tap in group.taps:
                unit_set = next(s for s in blocks.sets if tap.view in (s.base, s.shared))
                seen = self.seen.setdefault((group.name, unit_set.base), Seen(blocks, unit_set))
                self.taps.append((tap, seen, group.views()[tap.view]))
        self.mask: Tensor | None = None
        self.anchors: dict[int, list[Tensor]] = {}  # tap -> what the anchor showed in this batch, in order
        self.shown: dict[int, int] = {}  # tap -> how often the model that is running has shown it in this batch

    def run(self, models: Sequence[nn.Module], batches: Iterable[Any]) -> None:
        """Every batch through every model, in eval mode. Raises InputError if there is none."""
        count, training = 0, [model.training for model in models]
        try:
            with ExitStack() as hooks, torch.no_grad():
                for t, model in enumerate(models):
                    model.eval()
                    self.hook(t, hooks)
                for batch in batches:
                    count += 1
                    self.mask, self.anchors = mask_of(batch), {}
                    for model in models:
                        self.shown = {}
                        call(model, batch)
        finally:
            for model, was in zip(models, training, strict=True):
                model.train(was)
        if count == 0:
            raise InputError("find_permutations: there was no batch; give batches=None to go by the weights alone")

    def hook(self, t: int, hooks: ExitStack) -> None:
        for number, (tap, _, _) in enumerate(self.taps):
            if tap.module not in self.modules[t]:
                raise InputError(f"{tap.module}: activations are seen at its {tap.side}, model {t} has no such module")
            module, take = self.modules[t][tap.module], partial(self.take, number, t)
            if tap.side == "input":
                handle = module.register_forward_pre_hook(partial(on_input, take), with_kwargs=True)
            else:
                handle = module.register_forward_hook(partial(on_output, take))
            hooks.callback(handle.remove)

    def take(self, number: int, t: int, x: Tensor) -> None:
        """What tap `number` shows of model t."""
        tap, seen, size = self.taps[number]
        x = seen.add(self.samples(tap, size, x), tap.view, t)
        if not bool(torch.isfinite(seen.second[t]).all()):
            raise NonFinite(f"{tap.module}: its {tap.side} has NaN or infinite entries in the samples, in model {t}")
        if t == 0:
            self.anchors.setdefault(number, []).append(x)
            return
        waiting, at = self.anchors.get(number, []), self.shown.get(number, 0)
        self.shown[number] = at + 1
        if at >= len(waiting) or len(waiting[at]) != len(x):
            raise InputError(f"{tap.module}: model {t} does not run it on the samples that the first model runs it on")
        seen.add_products(waiting[at], x, tap.view, t)

    def samples(self, tap: Tap, size: int, x: Tensor) -> Tensor:
        """Float32 [S, n] without padding."""
        rows = without_padding(x.movedim(tap.axis, -1), self.mask)
        if rows.shape[1] != size * tap.part[1]:
            raise InputError(
                f"{tap.module}: axis {tap.axis} of its {tap.side} is {rows.shape[1]} wide, the groups need "
                f"{size * tap.part[1]}"
            )
        if tap.part != (0, 1):
            rows = rows[:, positions(size, tap).to(rows.device)]
        return rows.float()

    def scores(self, t: int) -> dict[str, dict[View, Tensor]]:
        """Group -> correlations of the anchor's units with those of model t. To be asked for once."""
        found: dict[str, dict[View, Tensor]] = {}
        for (group, _), seen in self.seen.items():
            if t in seen.count:
                found.setdefault(group, {}).update(seen.scores(t))
        return found


def on_input(take: Callable[[Tensor], None], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    show(take, (*args, *kwargs.values()))


def on_output(take: Callable[[Tensor], None], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    show(take, output if isinstance(output, tuple) else (output,))


def show(take: Callable[[Tensor], None], values: Iterable[Any]) -> None:
    found = next((value for value in values if isinstance(value, Tensor)), None)
    if found is not None:
        take(found)
