"""Checkpoints, and statistics of models, as permutations say: entries change places as they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from pymerge.align.clusters import Clusters
from pymerge.align.permutations import Permutations
from pymerge.checkpoint import AnyTensor, Checkpoint
from pymerge.checkpoint.made import MadeTensor
from pymerge.checkpoint.moved import MovedTensor
from pymerge.statistics import Statistics
from pymerge.statistics.moved import MovedStatistics


def aligned_view(model: Checkpoint, units: Permutations | Clusters, row: int) -> Checkpoint:
    """The checkpoint of model `row` in the anchor's order; of a zip, its share of the merged model. It uses the files
    of `model`, which stays the one to close."""
    tensors = {name: aligned_tensor(name, model, units, row) for name in model.file_order()}
    return Checkpoint(model.path, model.folder, tensors, list(model.files), pickled=model.pickled)


def aligned_tensor(name: str, model: Checkpoint, units: Permutations | Clusters, row: int) -> AnyTensor:
    if isinstance(units, Clusters):
        zipped = partial(units.aligned, name, model=row)
        return MadeTensor(model[name], zipped) if name in units.entries else model[name]
    source, moves = units.source(name, row), units.moves(name, row)
    return MovedTensor(name, model[source], moves) if moves or source != name else model[name]


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
