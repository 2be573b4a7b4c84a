"""Weights at rest: the only room that opens weight files (crash safety and untrusted input live here and nowhere "
"else)."""

from pymerge.checkpoint.header import ITEMSIZE, TORCH_NAME, safe_name
from pymerge.checkpoint.layout import Layout, Shard, Slot, plan_layout
from pymerge.checkpoint.read import AnyTensor, Checkpoint, LazyTensor, MemoryTensor, open_checkpoint

__all__ = [
    "ITEMSIZE",
    "TORCH_NAME",
    "AnyTensor",
    "Checkpoint",
    "Layout",
    "LazyTensor",
    "MemoryTensor",
    "Shard",
    "Slot",
    "open_checkpoint",
    "plan_layout",
    "safe_name",
]
