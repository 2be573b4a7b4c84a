"""Which unit of one model is which unit of another: permutation groups, how they are found and applied."""

from pymerge.align.groups import Entry, Group, Heads, Spec, Tap, Units
from pymerge.align.permutations import Permutations

__all__ = ["Entry", "Group", "Heads", "Permutations", "Spec", "Tap", "Units"]
