"""Checkpoints, and statistics of models, as permutations say: entries change places as they are read."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial

from torch import Tensor

from pymerge.align.clusters import Clusters
from pymerge.align.groups import Spec
from pymerge.align.permutations import Permutations
from pymerge.checkpoint import AnyTensor, Checkpoint, MemoryTensor
from pymerge.checkpoint.made import MadeTensor
from pymerge.checkpoint.moved import MovedTensor
from pymerge.statistics import Statistics
from pymerge.statistics.moved import MovedStatistics


def aligned_view(model: Checkpoint, units: Permutations | Clusters, row: int) -> Checkpoint:
    """The checkpoint of model `row` in the anchor's order; of a zip, its share of the merged model. It uses the files
    of `model`, which stays the one to close."""
    known = known_names(model, units.spec)
    tensors = {name: aligned_tensor(name, known[name], model, units, row) for name in model.file_order()}
    return model.viewed(tensors)


def known_names(model: Checkpoint, spec: Spec) -> dict[str, str]:
    """What the groups call each tensor: in memory, tied parameters are one tensor of several names, of which the groups
    may know one."""
    of_units = {name for group in spec.groups for names in getattr(group, "members", ()) for name in names}
    of_units |= {entry.parameter for group in spec.groups for entry in group.entries}
    listed = [name for name in model if name in of_units or any(fnmatchcase(name, fixed) for fixed in spec.fixed)]
    by_place = {place_of(model[name]): name for name in reversed(listed)}
    return {name: name for name in model} | {
        name: by_place[place]
        for name in model
        if name not in listed and (place := place_of(model[name])) is not None and place in by_place
    }


def place_of(tensor: AnyTensor) -> Hashable:
    """Equal for tensors that are one in memory; None: not in memory."""
    if not isinstance(tensor, MemoryTensor) or not tensor.nbytes:
        return None
    held = tensor.load()
    return held.data_ptr(), tensor.shape, held.stride()


def aligned_tensor(name: str, known: str, model: Checkpoint, units: Permutations | Clusters, row: int) -> AnyTensor:
    if isinstance(units, Clusters):
        zipped = partial(units.aligned, known, model=row)
        return MadeTensor(model[name], zipped) if known in units.entries else model[name]
    source, moves = units.source(known, row), units.moves(known, row)
    if source == known:
        return MovedTensor(name, model[name], moves) if moves else model[name]
    return MovedTensor(name, model[source], moves)


def aligned_statistics(statistics: Statistics, units: Permutations | Clusters, row: int) -> Statistics:
    """What the layers of model `row` see in the anchor's order. (A zip has no use for it: it is nothing but a mean.)"""
    if isinstance(units, Clusters):
        return statistics
    weights = {module: weight_of(module, units) for module in statistics.modules}
    holders = {
        module: statistics.header.modules[source_of(module, name, units, row)] for module, name in weights.items()
    }
    return MovedStatistics(
        header=replace(statistics.header, modules=holders),
        held=statistics.held,
        file=statistics.file,
        rows=statistics.rows,
        order=input_order(weights, statistics.header.transposed, units, row),
    )


def weight_of(module: str, units: Permutations) -> str:
    """The parameter that multiplies a module's input."""
    fused = f"{module}.in_proj_weight"
    return fused if fused in units.entries else f"{module}.weight"


def source_of(module: str, name: str, units: Permutations, row: int) -> str:
    """The module that is in the place of `module` before units (experts) move."""
    return units.source(name, row).removesuffix(name.removeprefix(module))


def input_order(
    weights: dict[str, str], transposed: tuple[str, ...], units: Permutations, row: int
) -> Callable[[str], Tensor | None]:
    def order(module: str) -> Tensor | None:
        return units.moves(weights[module], row).get(0 if module in transposed else 1)

    return order
