"""Which units of which architecture may be permuted: one file a family, a registry over them."""

from pymerge.align.specs.registry import families, floating_shapes, spec_for

__all__ = ["families", "floating_shapes", "spec_for"]
