"""Which unit of one model is which unit of another: permutation groups, how they are found and applied."""

from pymerge.align.api import find_permutations
from pymerge.align.clusters import Clusters
from pymerge.align.groups import Entry, Group, Heads, Spec, Tap, Units
from pymerge.align.permutations import Permutations
from pymerge.align.specs import floating_shapes, spec_for
from pymerge.align.store import open_permutations

__all__ = [
    "Clusters",
    "Entry",
    "Group",
    "Heads",
    "Permutations",
    "Spec",
    "Tap",
    "Units",
    "find_permutations",
    "floating_shapes",
    "open_permutations",
    "spec_for",
]
