"""A checkpoint as its permutations say: tensors change as they are read."""

from __future__ import annotations

from functools import partial

from pymerge.align.clusters import Clusters
from pymerge.align.permutations import Permutations
from pymerge.checkpoint import AnyTensor, Checkpoint
from pymerge.checkpoint.made import MadeTensor
from pymerge.checkpoint.moved import MovedTensor


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
