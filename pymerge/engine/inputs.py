"""Which matrices have statistics of their inputs, and whether those are of these models: known from headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint import Checkpoint, safe_name
from pymerge.errors import InputError, RecipeError
from pymerge.recipe import ModelRef

if TYPE_CHECKING:
    from pymerge.statistics import Statistics
    from pymerge.statistics.inputs import InputOf
    from pymerge.statistics.live import LiveStatistics

SUFFIXES = (".weight", ".in_proj_weight")  # a module's name and one of these is its matrix's name
SHOWN = 10


def opened_statistics(reference: ModelRef, model: ModelRef) -> Statistics:
    """The statistics that a recipe gives beside a model."""
    from pymerge.statistics import Statistics, open_statistics

    if not reference.in_memory:
        return open_statistics(reference.local)
    if not isinstance(reference.value, Statistics):
        given = type(reference.value).__name__
        raise RecipeError(f"statistics of {model.path}: must be a path or what `observe` returned, got {given}")
    return reference.value


def live_statistics(model: ModelRef, checkpoint: Checkpoint, *, sequential: bool) -> LiveStatistics:
    """What the model's layers see of the samples that a recipe gives beside it, observed when it is asked for;
    sequential: behind the layers that have been merged."""
    from pymerge.statistics import live
    from pymerge.statistics.samples import batches_of

    data, folder = model.data, Path(model.local)
    assert data is not None
    batch = data.batch
    if batch is None:
        (batch,) = batches_of(
            folder,
            Path(data.path),
            samples=data.samples,
            length=data.length,
            batch_size=data.samples,
            field=data.field,
        )
    return live.live_statistics(checkpoint, folder, batch, model.path, sequential=sequential)


@dataclass
class InputFinder:
    """Matches matrices with modules and collects what is wrong.

    statistics  of each model
    labels      of the models
    models      the models themselves
    """

    statistics: Sequence[Statistics]
    labels: Sequence[str]
    models: Sequence[Checkpoint]
    covered: int = 0
    uncovered: list[str] = field(default_factory=list)
    absent: dict[str, list[str]] = field(default_factory=dict)  # label -> modules that its statistics lack
    problems: list[tuple[type[InputError] | type[RecipeError], str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def module_of(self, name: str) -> str | None:
        """The observed module whose matrix this is, by the statistics of any model."""
        modules = [name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)]
        return next((m for m in modules if any(m in found for found in self.statistics)), None)

    def find(self, name: str, shape: tuple[int, ...], split: int | None) -> tuple[InputOf, ...]:
        """The inputs of a matrix in each model; empty where it has no statistics or a problem was noted.

        split  the dimension along which the matrix is merged in parts"""
        from pymerge.statistics.inputs import InputOf

        module = self.module_of(name)
        if module is None:
            self.uncovered.append(safe_name(name))
            return ()
        self.covered += 1
        lacking = [label for label, s in zip(self.labels, self.statistics, strict=True) if module not in s]
        for label in lacking:
            self.absent.setdefault(label, []).append(safe_name(module))
        if lacking:
            return ()
        transposed = self.is_transposed(name)
        width = shape[0 if transposed else 1]
        for label, found in zip(self.labels, self.statistics, strict=True):
            if found.width(module) != width:
                self.problems.append(
                    (
                        InputError,
                        f"statistics of {label}: the input of {safe_name(module)} has {found.width(module)} features, "
                        f"{safe_name(name)} {list(shape)} takes {width}",
                    )
                )
                return ()
        if split is not None and split != int(transposed):
            text = f"split: {safe_name(name)} is cut along its input dimension, the statistics are of the whole input"
            self.problems.append((RecipeError, f"{text}: cut it along dim {int(transposed)}, or not at all"))
            return ()
        return tuple(InputOf(statistics=found, module=module) for found in self.statistics)

    def is_transposed(self, name: str) -> bool:
        """Whether the matrix is stored [in, out]."""
        module = self.module_of(name)
        return any(module in found.header.transposed for found in self.statistics)

    def check_join(self, names: Sequence[str]) -> None:
        """Matrices that are merged as one must see one input."""
        modules = [self.module_of(name) or "" for name in names]
        shared = all(found.share_input(modules) for found in self.statistics)
        if not shared or any(self.is_transposed(name) for name in names):
            self.problems.append((RecipeError, not_shared(names)))

    def finish(self) -> None:
        """What is known when all matrices have been seen."""
        for label, modules in self.absent.items():
            self.problems.append(
                (
                    InputError,
                    f"statistics of {label}: nothing of {shortened(modules)}, which other models' statistics have: "
                    "observe all models with the same targets",
                )
            )
        if self.uncovered and not self.covered:
            observed = shortened([safe_name(module) for module in self.statistics[0].modules])
            self.problems.append(
                (
                    InputError,
                    f"the statistics are of none of the matrices: they have modules {observed}; the matrices are "
                    f"{shortened(self.uncovered)}",
                )
            )
        elif self.uncovered:
            self.notes.append(
                f"matrices without statistics of their input: {len(self.uncovered)}: {shortened(self.uncovered)}"
            )
        for i in range(len(self.models)):
            self.check_origin(i)

    def check_origin(self, i: int) -> None:
        """Statistics of another model are refused. Files that agree in size and header but not in time may be a copy:
        then the summary says so, unless they are exactly those of another model of the recipe."""
        said = self.statistics[i].header.model
        own = self.models[i].fingerprint()
        if "files" not in said or "files" not in own:
            return
        label = self.labels[i]
        if same_files(said, own, time=True):
            return
        other = next((j for j, m in enumerate(self.models) if same_files(said, m.fingerprint(), time=True)), None)
        made_of = f"statistics of {label}: made from {said.get('path', 'another model')}"
        if other is not None:
            self.problems.append(
                (InputError, f"{made_of}, which is {self.labels[other]}: give them in the models' order")
            )
        elif not same_files(said, own, time=False):
            self.problems.append(
                (InputError, f"{made_of}, whose weight files are not those of {label}: observe {label}")
            )
        elif said.get("path") == own["path"]:
            self.problems.append((InputError, f"{made_of}, which has been written since: observe it again"))
        else:
            self.notes.append(f"{made_of}; its files have the size and header of {label}, their time differs")


def same_files(one: Mapping[str, Any], other: Mapping[str, Any], *, time: bool) -> bool:
    """Whether two fingerprints agree in the files' names, sizes, headers, and times of writing."""

    def files(of: Mapping[str, Any]) -> list[list[Any]]:
        return [[name, size, digest, *([mtime] if time else [])] for name, size, mtime, digest in of.get("files", ())]

    return files(one) == files(other)


def not_shared(names: Sequence[str]) -> str:
    listed = ", ".join(safe_name(name) for name in names)
    return f"join: {listed}: do not share their input, merge them apart"


def shortened(names: Sequence[str]) -> str:
    return f"{', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}"
