"""An inspection as plain data: what `--json` writes and `Inspection.to_dict` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pymerge.engine.moments import Moments
from pymerge.report import measures
from pymerge.report.spectra import HELD, Spectrum
from pymerge.version import __version__

if TYPE_CHECKING:
    from pymerge.report.inspection import Group, Inspection, TensorFound


def plain(found: Inspection) -> dict[str, Any]:
    """Lists have one entry a model; matrices [T][T] have one a pair, with None on the diagonal."""
    return {
        "pymerge": __version__,
        "base": found.base,
        "models": list(found.models),
        "rank": found.rank,
        "bytes_read": found.bytes_read,
        "seconds": found.seconds,
        "suggestions": [asdict(suggestion) for suggestion in found.suggestions],
        "whole": of_group(found.whole),
        "kinds": [{"kind": kind} | of_group(group) for kind, group in found.kinds.items()],
        "layers": [
            {"stack": stack, "layer": number} | of_group(group) for (stack, number), group in found.layers.items()
        ],
        "magnitude_edges": list(measures.EDGES),
        "tensors": [of_tensor(tensor) for tensor in found.tensors],
        "untouched": found.untouched(),
        "left_out": found.left_out,
        "notes": list(found.notes),
    }


def of_moments(m: Moments) -> dict[str, Any]:
    return {
        "entries": m.entries,
        "weight_norm": m.base**0.5,
        "update_norm": measures.norms(m),
        "relative_norm": measures.relative_norms(m),
        "changed": measures.changed(m),
        "magnitudes": m.octaves.tolist(),
        "cosine": measures.square(m.tasks, lambda pair: measures.cosine(m, pair)),
        "opposed_signs": measures.square(m.tasks, lambda pair: measures.opposed(m, pair)),
        "conflicting_entries": measures.conflicted(m),
        "cancelled_magnitude": measures.cancelled(m),
    }


def of_spectra(spectra: Sequence[Spectrum], tasks: int) -> dict[str, Any]:
    """Means over matrices; certified: medians."""
    if not spectra:
        return {}
    each = range(tasks)
    return {
        "matrices": len(spectra),
        "effective_rank": [measures.effective_rank(spectra, t) for t in each],
        "stable_rank": [measures.stable_rank(spectra, t) for t in each],
        "certified_rank": [measures.certified(spectra, t) for t in each],
        "captured": [measures.captured(spectra, t) for t in each],
        "subspace_overlap": measures.square(tasks, lambda pair: measures.overlap(spectra, pair)),
        "overlap_by_chance": measures.square(tasks, lambda pair: measures.overlap_by_chance(spectra, pair)),
    }


def of_group(group: Group) -> dict[str, Any]:
    return {"tensors": group.tensors} | of_moments(group.moments) | of_spectra(group.spectra, len(group.moments.l1))


def of_tensor(tensor: TensorFound) -> dict[str, Any]:
    stack, number = tensor.layer or (None, None)
    place = {"name": tensor.name, "kind": tensor.kind, "stack": stack, "layer": number, "shape": list(tensor.shape)}
    return place | of_moments(tensor.moments) | {"spectra": [of_spectrum(s) for s in tensor.spectra]}


def of_spectrum(s: Spectrum) -> dict[str, Any]:
    each = range(len(s.values))
    return {
        "matrix": s.name,
        "shape": list(s.shape),
        "singular_values": [list(values) for values in s.values],
        "update_norm": [energy**0.5 for energy in s.energy],
        "certified_rank": list(s.certified),
        "effective_rank": list(s.effective_ranks),
        "stable_rank": [s.stable_rank(t) for t in each],
        f"rank_of_{HELD:.0%}".replace("%", "_percent"): list(s.ranks_held),
        "overlaps": [
            {
                "models": list(pair),
                "rank": o.rank,
                "mean": o.mean,
                "cosines_left": list(o.left),
                "cosines_right": list(o.right),
            }
            for pair, o in s.overlaps.items()
        ],
    }
