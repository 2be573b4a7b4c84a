"""How alike the units of two models are in what they compute on the same samples: streamed, shifted moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pymerge.align.groups import Spec, Tap, View
from pymerge.align.match import Blocks, UnitSet, blocks_of
from pymerge.align.moments import Moments, folded, moments, similarities
from pymerge.align.permutations import positions
from pymerge.errors import InputError, NonFinite
from pymerge.statistics.collect import without_padding
from pymerge.statistics.observing import call, mask_of


@dataclass
class Seen:
    """The sums of one set of units: samples of all its taps together.

    shift   of each model, [n]: the mean of its first samples, so that little is lost in float32; correlations do not
            change with it
    first, second   of each model, float64 [n]: sums and sums of squares of what is left
    products  view -> pair of models -> float32 [n, n] (r n for a shared view)
    count   samples a unit
    """

    blocks: Blocks
    unit_set: UnitSet
    shift: dict[int, Tensor] = field(default_factory=dict)
    first: dict[int, Tensor] = field(default_factory=dict)
    second: dict[int, Tensor] = field(default_factory=dict)
    products: dict[View, dict[tuple[int, int], Tensor]] = field(default_factory=dict)
    count: dict[int, int] = field(default_factory=dict)

    def shifted(self, x: Tensor, view: View, t: int) -> Tensor:
        """Samples [S, n] (r n for the shared view) less the shift, which the first of them set."""
        shared, r = view == self.unit_set.shared, self.blocks.queries
        if t not in self.shift:
            mean = x.sum(0) / max(1, len(x))
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

    def add_products(self, one: Tensor, other: Tensor, view: View, pair: tuple[int, int]) -> None:
        of_view = self.products.setdefault(view, {})
        if pair not in of_view:
            of_view[pair] = one.new_zeros(one.shape[1], one.shape[1])
        of_view[pair].addmm_(one.T, other)

    def moments(self, t: int) -> Moments:
        return moments(self.count[t], self.first[t].cpu(), self.second[t].cpu(), cosine=False)

    def scores(self, t: int) -> dict[View, Tensor]:
        """Correlations of the anchor's units with those of model t."""
        grams: dict[View, Tensor] = {view: of_view.pop((0, t)).cpu() for view, of_view in self.products.items()}
        return similarities(self.blocks, self.unit_set, grams, (self.moments(0), self.moments(t)))

    def all_scores(self, models: int) -> Tensor:
        """Correlations of the units of all models with each other [T n, T n], of a set without a shared view."""
        products = self.products[self.unit_set.base]
        blocks = [[products[s, t] if s <= t else products[t, s].T for t in range(models)] for s in range(models)]
        gram = torch.cat([torch.cat(row, 1) for row in blocks]).cpu()
        parts = [self.moments(t) for t in range(models)]
        of = replace(parts[0], mean=torch.cat([m.mean for m in parts]), size=torch.cat([m.size for m in parts]))
        return similarities(self.blocks, self.unit_set, {self.unit_set.base: gram}, (of, of))[self.unit_set.base]


class PairCollector:
    """Taps on models that see the same batches one after another, the anchor (number 0) first.

    Holds the anchor's activations of one batch, and for each tapped view and model n^2 float32; with all_pairs those of
    all models, and n^2 for each pair of models, one with itself too.

    modules  of each model by the names that the spec uses"""

    def __init__(self, spec: Spec, modules: Sequence[Mapping[str, nn.Module]], *, all_pairs: bool) -> None:
        self.modules, self.all_pairs = modules, all_pairs
        self.seen: dict[tuple[str, View], Seen] = {}  # by group and base view
        self.taps: list[tuple[Tap, Seen, int]] = []  # with the number of units
        for group in spec.groups:
            blocks = blocks_of(group)
            for tap in group.taps:
                unit_set = next(s for s in blocks.sets if tap.view in s.views)
                seen = self.seen.setdefault((group.name, unit_set.base), Seen(blocks, unit_set))
                self.taps.append((tap, seen, group.views()[tap.view]))
        self.mask: Tensor | None = None
        self.shown: dict[tuple[int, int], list[Tensor]] = {}  # tap and model -> what it showed in this batch, in order

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
                    self.mask, self.shown = mask_of(batch), {}
                    for model in models:
                        call(model, batch)
                    self.check_shown()
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

    def check_shown(self) -> None:
        """After a batch: every model has shown at each tap as often as the anchor."""
        for number in range(len(self.taps)):
            counts = [len(self.shown.get((number, t), [])) for t in range(len(self.modules))]
            for t, count in enumerate(counts):
                if count != counts[0]:
                    raise self.unlike(number, t, 0)

    def unlike(self, number: int, t: int, other: int) -> InputError:
        module = self.taps[number][0].module
        return InputError(f"{module}: model {t} does not run it on the samples that model {other} runs it on")

    def take(self, number: int, t: int, x: Tensor) -> None:
        """What tap `number` shows of model t."""
        tap, seen, size = self.taps[number]
        x = seen.add(self.samples(tap, size, x), tap.view, t)
        if not bool(torch.isfinite(seen.second[t]).all()):
            raise NonFinite(f"{tap.module}: its {tap.side} has NaN or infinite entries in the samples, in model {t}")
        own = self.shown.setdefault((number, t), [])
        own.append(x if self.all_pairs or t == 0 else x.new_empty(0))  # only counted
        for other in range(t + 1) if self.all_pairs else range(min(t, 1)):
            showed = self.shown.get((number, other), [])
            if len(showed) < len(own) or len(showed[len(own) - 1]) != len(x):
                raise self.unlike(number, t, other)
            seen.add_products(showed[len(own) - 1], x, tap.view, (other, t))

    def samples(self, tap: Tap, size: int, x: Tensor) -> Tensor:
        """Float32 [S, n] without padding."""
        rows = without_padding(x.movedim(tap.axis, -1), self.mask)
        if rows.shape[1] != size * tap.part[1]:
            raise InputError(
                f"{tap.module}: axis {tap.axis} of its {tap.side} is {rows.shape[1]} wide, the groups need "
                f"{size * tap.part[1]}"
            )
        if tap.part != (0, 1):
            rows = rows[:, positions(size, tap).flatten().to(rows.device)]
        return rows.float()

    def scores(self, t: int) -> dict[str, dict[View, Tensor]]:
        """Group -> correlations of the anchor's units with those of model t. To be asked for once."""
        found: dict[str, dict[View, Tensor]] = {}
        for (group, _), seen in self.seen.items():
            if seen.count.get(t):
                found.setdefault(group, {}).update(seen.scores(t))
        return found

    def all_scores(self) -> dict[str, Tensor]:
        """Group -> correlations of all units of all models, for groups of one set of units."""
        return {group: seen.all_scores(len(self.modules)) for (group, _), seen in self.seen.items() if seen.count}


def on_input(take: Callable[[Tensor], None], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    show(take, (*args, *kwargs.values()))


def on_output(take: Callable[[Tensor], None], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    show(take, output if isinstance(output, tuple) else (output,))


def show(take: Callable[[Tensor], None], values: Iterable[Any]) -> None:
    found = next((value for value in values if isinstance(value, Tensor)), None)
    if found is not None:
        take(found)
