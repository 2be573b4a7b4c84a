"""Weights at rest: crash safety and untrusted input live in this room and nowhere else."""

from pymerge.checkpoint.adapted import AdaptedTensor
from pymerge.checkpoint.card import write_card
from pymerge.checkpoint.header import ITEMSIZE, TORCH_NAME, safe_name
from pymerge.checkpoint.layout import Layout, Shard, Slot, plan_layout
from pymerge.checkpoint.place import check_output_path
from pymerge.checkpoint.read import AnyTensor, Checkpoint, LazyTensor, MemoryTensor, open_checkpoint
from pymerge.checkpoint.sidefiles import copy_side_files, plan_side_files
from pymerge.checkpoint.write import StagedOutput

__all__ = [
    "ITEMSIZE",
    "TORCH_NAME",
    "AdaptedTensor",
    "AnyTensor",
    "Checkpoint",
    "Layout",
    "LazyTensor",
    "MemoryTensor",
    "Shard",
    "Slot",
    "StagedOutput",
    "check_output_path",
    "copy_side_files",
    "open_checkpoint",
    "plan_layout",
    "plan_side_files",
    "safe_name",
    "write_card",
]
