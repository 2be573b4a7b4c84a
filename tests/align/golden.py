"""Reads golden/mudsc: models, the groups that its metadata describes, similarities, answers."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from pymerge.align import Entry, Heads, Spec, Tap, Units
from pymerge.checkpoint import Checkpoint, open_checkpoint


class Golden:
    """One file; see its README."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            self.tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.metadata = {key: value for key, value in metadata.items()}
        self.params: dict[str, Any] = json.loads(metadata["params"])
        self.objective: dict[str, Any] = json.loads(metadata["objective"])
        self.exact = metadata["judge"] == "exact"

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    @cached_property
    def models(self) -> list[Checkpoint]:
        return [open_checkpoint(self.under(f"task{t}/")) for t in range(self.params["T"])]

    @cached_property
    def spec(self) -> Spec:
        """Its groups as they are: heads in two groups of blocks, (q, k) and v."""
        return Spec(groups=tuple(self.units(group) for group in json.loads(self.metadata["spec"])))

    def units(self, group: dict[str, Any]) -> Units:
        entries = list(dict.fromkeys(entry_of(given) for given in group["entries"]))  # thirds of a fused axis: once
        shape = self.models[0][entries[0].parameter].shape
        return Units(
            name=group["group"],
            size=shape[entries[0].axis] // entries[0].part[1],
            entries=tuple(entries),
            taps=(Tap(module=group["activation"][-1]["name"]),),
            blocks=group["blocks"],
        )

    @cached_property
    def tied(self) -> Spec:
        """The groups of a ViT with (q, k) and v of a layer as Heads, named as its (q, k)."""
        groups: list[Units | Heads] = []
        given = iter(self.spec.groups)
        for group in given:
            if group.blocks == 1:
                groups.append(group)
                continue
            values = next(given)
            entries = [with_view(e, ("q", "k")[e.part[0]]) for e in group.entries]
            entries += [with_view(e, "v" if e.role == "out" else "o") for e in values.entries]
            heads = {"heads": group.blocks, "kv_heads": group.blocks, "width": group.size // group.blocks}
            groups.append(Heads(name=group.name, entries=tuple(entries), **heads))
        return Spec(groups=tuple(groups))

    def activations(self, t: int) -> dict[str, dict[str, Tensor]]:
        """Of model t + 1, by group; none where the case has none."""
        return {name: {"units": found[t].clone()} for name, found in self.under("intermediate/act_sim/").items()}


def entry_of(given: dict[str, Any]) -> Entry:
    part = tuple(given["chunk"]) if "chunk" in given and given["axis"] == 0 else (0, 1)
    return Entry(
        parameter=given["param"],
        axis=given["axis"],
        role=given["role"],
        part=part,
        similarity=given.get("similarity") != "ignored",
    )


def with_view(entry: Entry, view: Any) -> Entry:
    return Entry(parameter=entry.parameter, axis=entry.axis, role=entry.role, part=entry.part, view=view)
