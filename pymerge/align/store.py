"""Permutations and clusters in one safetensors file: the index vectors as tensors, the spec and the rest as text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from pymerge.align.clusters import Clusters
from pymerge.align.groups import Entry, Group, Heads, Spec, Tap, Units
from pymerge.align.permutations import Permutations
from pymerge.checkpoint import open_checkpoint
from pymerge.errors import CorruptFile, InputError

FORMAT = "1"
KINDS = {"permutations": Permutations, "clusters": Clusters}
GROUPS = {"units": Units, "heads": Heads}


def save(found: Permutations | Clusters, path: str | os.PathLike[str]) -> None:
    """Write a file that `open_permutations` reads; it appears complete or not at all."""
    from safetensors.torch import save as to_bytes

    tensors = {
        f"{group}/{view}": rows.contiguous() for group, views in found.index.items() for view, rows in views.items()
    }
    kind = next(kind for kind, cls in KINDS.items() if isinstance(found, cls))
    metadata = {
        "pymerge_permutations": FORMAT,
        "kind": kind,
        "spec": json.dumps(spec_to_json(found.spec)),
        "models": json.dumps(found.models),
        "report": json.dumps(found.report),
        "fingerprints": json.dumps(found.fingerprints),
    }
    partial = Path(f"{os.fspath(path)}.partial")
    with open(partial, "wb") as file:
        file.write(to_bytes(tensors, metadata))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def open_permutations(path: str | os.PathLike[str]) -> Permutations | Clusters:
    """What `save` has written, checked.

    Raises   InputError (no such file, another format, index vectors that do not fit the groups), CorruptFile"""
    if os.path.isdir(path):
        raise InputError(f"{path}: a folder, no file of permutations; make one with `pymerge align`")
    with open_checkpoint(path) as file:
        metadata = file.files[0].metadata
        if metadata.get("pymerge_permutations") != FORMAT:
            found = metadata.get("pymerge_permutations", "none")
            raise InputError(
                f"{path}: no file of permutations of format {FORMAT} (found: {found}); make one with `pymerge align`"
            )
        index: dict[str, dict[Any, Tensor]] = {}
        for name in file:
            group, _, view = name.rpartition("/")
            index.setdefault(group, {})[view] = file[name].load()
    try:
        text = {key: json.loads(metadata[key]) for key in ("spec", "models", "report", "fingerprints")}
        units = KINDS[metadata["kind"]](
            spec=spec_from_json(text["spec"]),
            index=index,
            models=tuple(text["models"]),
            report=text["report"],
            fingerprints=tuple(text["fingerprints"]),
        )
        units.check()
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as e:
        raise CorruptFile(f"{path}: the file of permutations is damaged: {type(e).__name__}: {e}") from e
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    return units


def spec_to_json(spec: Spec) -> dict[str, Any]:
    kinds = {cls: kind for kind, cls in GROUPS.items()}
    return {"groups": [{"kind": kinds[type(group)], **asdict(group)} for group in spec.groups], "fixed": spec.fixed}


def spec_from_json(text: Mapping[str, Any]) -> Spec:
    return Spec(groups=tuple(map(group_from_json, text["groups"])), fixed=tuple(text["fixed"]))


def group_from_json(text: Mapping[str, Any]) -> Group:
    fields = dict(text)
    cls = GROUPS[fields.pop("kind")]
    fields["entries"] = tuple(Entry(**{**entry, "part": tuple(entry["part"])}) for entry in fields["entries"])
    fields["taps"] = tuple(Tap(**{**tap, "part": tuple(tap["part"])}) for tap in fields["taps"])
    if "members" in fields:
        fields["members"] = tuple(map(tuple, fields["members"]))
    return cls(**fields)
