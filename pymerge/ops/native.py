"""What the host module `pymerge._C` takes, made from a `DeltaRule`. No torch."""

from __future__ import annotations

from pymerge._C import DeltaParams
from pymerge.ops.delta_rule import DeltaRule


def delta_params(rule: DeltaRule) -> DeltaParams:
    """The resolved rule as the native kernels read it; immutable, to be shared by all tiles and threads of a tensor."""
    top, skip = rule.top_cut, rule.skip_cut
    return DeltaParams(
        weights=rule.weights,
        scale=rule.scale,
        divisor=rule.divisor,
        rescales=rule.rescales,
        keep=rule.keep,
        keys=rule.keys if rule.keep is not None else None,
        row_length=rule.row_length or 0,
        top_theta=None if top is None else top.theta,
        top_index=None if top is None else top.index,
        skip_theta=None if skip is None else skip.theta,
        skip_index=None if skip is None else skip.index,
        elect=rule.elect is not None,
        tie_sign=rule.tie_sign,
        norm=rule.norm,
    )
