"""A part of a checkpoint under other names."""

from __future__ import annotations

from collections.abc import Mapping

from pymerge.checkpoint.read import Checkpoint


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """The tensors called `names` (new name -> name in the checkpoint), in this order. They are read from the files of
    `checkpoint`, which stays the one to watch and to close; its config is theirs, its folder is not."""
    view = Checkpoint(checkpoint.path, None, {new: checkpoint[name] for new, name in names.items()}, [])
    view.config = checkpoint.config
    return view
