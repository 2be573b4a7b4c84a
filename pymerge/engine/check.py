"""Everything that can be known from headers: which tensors are merged, copied or refused. Nothing is read but headers.

All problems are collected and reported together; a relaxation named in the recipe turns one into a note of the summary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pymerge.checkpoint import AnyTensor, Checkpoint, safe_name
from pymerge.checkpoint.quantised import quantised
from pymerge.checkpoint.tied import tied_pairs
from pymerge.engine.asking import asks_model, survey_scope
from pymerge.engine.expert_matrices import Part, expert_parts
from pymerge.engine.inputs import InputFinder
from pymerge.engine.problems import Problems
from pymerge.errors import (
    ExtraTensor,
    MissingTensor,
    RecipeError,
    ShapeMismatch,
    UnsupportedDtype,
    VocabMismatch,
)
from pymerge.methods.base import AdapterCombine, TensorInfo
from pymerge.recipe import Layers, Recipe, Steps

if TYPE_CHECKING:
    from pymerge.statistics import Statistics
    from pymerge.statistics.inputs import InputOf

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # dtypes that are averaged, with their bytes
VOCABULARY = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_out", "shared", "embedding", "score")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One output tensor, checked: where it comes from and what is done to it.

    count  entries that are merged (all, or the rows common to all models); those behind are copied from `reference`
    """

    name: str
    shape: tuple[int, ...]
    dtype: str  # of the output
    reference: AnyTensor  # gives the place in the order of reading, and the values where nothing is merged
    base: AnyTensor | None = None  # subtracted from the tuned tensors and added back
    tuned: tuple[AnyTensor, ...] = ()
    weights: tuple[AnyTensor, ...] = ()  # importances of the tuned tensors' entries, where the method has them
    inputs: tuple[InputOf, ...] = ()  # of the layer, in each model, where a step needs them and there are statistics
    transposed: bool = False  # stored [in, out]; only told where there are inputs
    depth: float | None = None  # place of its layer in its stack, from 0 to 1
    steps: Steps | None = None  # None: copied
    count: int = 0  # entries that are merged
    split: tuple[int, tuple[int, ...]] | None = None  # merged in parts: the dimension, and the sizes along it
    join: tuple[int, int] | None = None  # merged with other matrices as one: number of the group, place in it
    parts: tuple[Part, ...] = ()  # of experts stored as one: its matrices, which make up all of it
    equal_to: tuple[AnyTensor, ...] = ()  # integer buffers: must hold the same bytes
    labels: tuple[str, ...] = ()  # what the reference and the models are called
    subtracts: bool = True  # False: tuned is an update already, the base is only added to it
    adds: bool = True  # False: the output is the update, to which no base is added

    @property
    def merged(self) -> bool:
        return self.steps is not None

    @property
    def merged_shape(self) -> tuple[int, ...]:
        """Shape of what is merged: fewer rows where the models have only some in common."""
        if not self.shape:
            return ()
        return (self.count // max(1, math.prod(self.shape[1:])), *self.shape[1:])

    def info(self, seed: int) -> TensorInfo:
        """What methods are told of it."""
        shape, tasks = self.merged_shape, len(self.tuned)
        return TensorInfo(name=self.name, shape=shape, tasks=tasks, seed=seed, depth=self.depth)


@dataclass
class Checker:
    """Walks the reference model's names and decides for each."""

    recipe: Recipe
    base: Checkpoint | None
    models: Sequence[Checkpoint]
    labels: Sequence[str]
    fisher: Sequence[Checkpoint] = ()  # of each model, where the method has it
    statistics: Sequence[Statistics] = ()  # likewise
    notes: list[str] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)
    layers: Layers | None = None  # of a part of an output; None: the models are whole

    def __post_init__(self) -> None:
        self.reference = self.base if self.base is not None else self.models[0]
        self.reference_label = "base" if self.base is not None else self.labels[0]
        self.tied = [tied_pairs(model) for model in self.models]  # per model: name -> name that holds its values
        self.reference_tied = tied_pairs(self.reference)
        self.others = [(label, m, t) for label, m, t in zip(self.labels, self.models, self.tied, strict=True)]
        self.relaxed: dict[str, list[str]] = {}
        self.steps: dict[str, Steps] = {}  # of the tensors that the recipe selects
        self.join_of: dict[str, tuple[int, int]] = {}
        self.rest: list[str] = []  # tensors that go past the steps for matrices
        self.relaxations = self.recipe.relaxations
        self.inputs = InputFinder(self.statistics, self.labels, self.models) if self.statistics else None

    def run(self) -> list[Entry]:
        """Output entries in the order of the reference model's files; what is wrong is in `problems`."""
        labelled = {self.reference_label: self.reference} | {label: model for label, model, _ in self.others}
        self.problems.found += [(UnsupportedDtype, text) for text in quantised(labelled, self.recipe.selects)]
        self.problems.raise_all()  # before all that follows from it
        names = self.reference.file_order()
        layers = self.layers or Layers.of(names)
        self.depths = layers.depths
        self.steps = self.recipe.resolve(names, layers)
        self.check_extra(set(names))
        self.find_joins()
        entries = [entry for name in names if (entry := self.entry(name)) is not None]
        if self.relaxations.get("extra") == "copy":
            entries += self.extra_copies({entry.name for entry in entries})
        if self.inputs is not None:
            self.inputs.finish()
            self.problems.found += self.inputs.problems
            self.notes += self.inputs.notes
        if self.rest:
            listed = f"{', '.join(self.rest[:10])}{' ...' if len(self.rest) > 10 else ''}"
            self.notes.append(
                f"no weight matrices, merged without the steps for these: {len(self.rest)} tensor(s): {listed}"
            )
        for what, items in self.relaxed.items():
            self.notes.append(
                f"{what}: {len(items)} tensor(s): {', '.join(items[:10])}{' ...' if len(items) > 10 else ''}"
            )
        return entries

    def relax(self, what: str, name: str) -> None:
        self.relaxed.setdefault(what, []).append(safe_name(name))

    def out_dtype(self, tensor: AnyTensor) -> str:
        asked = self.recipe.output_dtype
        return asked if asked and tensor.stored in FLOATS else tensor.stored

    def copied(self, name: str, tensor: AnyTensor, equal_to: tuple[AnyTensor, ...] = ()) -> Entry:
        return Entry(
            name=name,
            shape=tensor.shape,
            dtype=self.out_dtype(tensor),
            reference=tensor,
            equal_to=equal_to,
            labels=(self.reference_label, *self.labels),
        )

    def entry(self, name: str) -> Entry | None:
        reference = self.reference[name]
        if name not in self.steps:
            self.relax("excluded by the recipe, copied from " + self.reference_label, name)
            return self.copied(name, reference)
        found = self.find_all(name)
        if found is None:
            return None
        if (found == [] and self.models) or self.is_untouched(name, found):
            return self.copied(name, reference)
        if not self.dtypes_fit(name, [reference, *found]):
            return None
        if reference.dtype not in FLOATS:
            others = () if self.relaxations.get("buffers") == "base" else tuple(found)
            return self.copied(name, reference, others)
        count = self.common_count(name, reference, found)
        if count is None:
            return None
        weights = self.find_fisher(name, found)
        steps = self.recipe.routed(self.steps[name], name, reference.shape)
        if steps is None:
            self.relax(f"no weight matrices, kept at {self.reference_label}'s values", name)
            return self.copied(name, reference)
        if steps is not self.steps[name]:
            self.rest.append(safe_name(name))
        base = reference if self.recipe.subtract_base else None
        split = self.split_of(name, reference.shape, steps)
        stacked = steps.spectral and len(reference.shape) == 3 and self.recipe.decomposes(name, reference.shape)
        finder = self.inputs if steps.need_inputs else None
        inputs = finder.find(name, reference.shape, split and split[0]) if finder is not None else ()
        return Entry(
            name=name,
            shape=reference.shape,
            dtype=self.out_dtype(reference),
            reference=reference,
            base=base,
            tuned=tuple(found),
            weights=weights,
            inputs=inputs,
            transposed=finder is not None and finder.is_transposed(name),
            depth=self.depths[name],
            steps=steps,
            count=count,
            split=split,
            join=self.join_of.get(name),
            labels=(self.reference_label, *self.labels),
            parts=expert_parts(self.reference, name) if stacked else (),
        )

    def is_untouched(self, name: str, found: Sequence[AnyTensor]) -> bool:
        """Whether all are adapters that leave it to the base. Where a step looks at the whole model, it counts too."""
        steps, base = self.steps[name], self.reference[name]
        whole = survey_scope(steps) == "model" or asks_model(steps)
        whole = bool(steps.combine.beside) or (whole and not isinstance(steps.combine, AdapterCombine))
        return self.recipe.subtract_base and not whole and all(t is base for t in found)

    def split_of(self, name: str, shape: tuple[int, ...], steps: Steps) -> tuple[int, tuple[int, ...]] | None:
        split = self.recipe.fused.split_of(name)
        if split is None:
            return None
        if not (steps.spectral and self.recipe.matrices.has(name, shape)):
            self.problems.add(
                RecipeError, f"split: {safe_name(name)} is not merged by a method for matrices, or is no matrix"
            )
            return None
        try:
            return split.dim, split.sizes(name, shape)
        except RecipeError as e:
            self.problems.add(RecipeError, str(e))
            return None

    def find_joins(self) -> None:
        """Numbers the groups of matrices that are merged as one, and checks that they fit together."""
        try:
            groups = self.recipe.fused.groups(name for name in self.steps if name in self.reference)
        except RecipeError as e:
            self.problems.add(RecipeError, str(e))
            return
        for number, names in enumerate(groups):
            shapes = [self.reference[name].shape for name in names]
            dtypes = {self.reference[name].dtype for name in names}
            fits = len({shape[1:] for shape in shapes}) == 1 and len(dtypes) == 1
            if not fits or len({id(self.steps[name]) for name in names}) > 1 or not self.are_matrices(names):
                listed = ", ".join(f"{safe_name(n)} {list(s)}" for n, s in zip(names, shapes, strict=True))
                self.problems.add(
                    RecipeError,
                    f"join: {listed}: must be matrices with equally many columns, one dtype, equal hyperparameters and "
                    "no split, merged by a method for matrices",
                )
            self.join_of |= {name: (number, place) for place, name in enumerate(names)}
            if self.inputs is not None and all(self.steps[name].need_inputs for name in names):
                self.inputs.check_join(names)

    def are_matrices(self, names: Sequence[str]) -> bool:
        return all(
            self.steps[name].spectral
            and self.recipe.matrices.has(name, self.reference[name].shape)
            and self.recipe.fused.split_of(name) is None
            for name in names
        )

    def find_all(self, name: str) -> list[AnyTensor] | None:
        """The tensor in every model. None: a problem was noted. Empty: copy the reference's."""
        found = []
        for label, model, tied in self.others:
            if name in model:
                found.append(model[name])
            elif name in tied:  # lm_head of a tied model lives under the embedding's name
                found.append(model[tied[name]])
                self.notes.append(f"{safe_name(name)}: tied in {label}, its {safe_name(tied[name])} is used")
            elif self.reference[name].dtype not in FLOATS:  # a buffer is never merged, so nothing is lost
                self.relax(f"buffer absent from {label}, copied from {self.reference_label}", name)
            elif (how := self.relaxations.get("missing")) is not None:
                self.relax(f"absent from {label}, " + ("base used" if how == "base" else "copied"), name)
                if how != "base":
                    return []
                found.append(self.reference[name])
            else:
                self.problems.add(
                    MissingTensor,
                    f"{safe_name(name)}: in {self.reference_label}, absent from {label}. Merge models fine-tuned "
                    "from one base, or say `relax: {missing: base}` to use the base's values for that model.",
                )
                return None
        return found

    def find_fisher(self, name: str, found: Sequence[AnyTensor]) -> tuple[AnyTensor, ...]:
        """The importances of the tensor's entries in every model; what is absent or does not fit is a problem."""
        weights = []
        for fisher, tensor, (label, _, tied) in zip(self.fisher, found, self.others, strict=False):
            held = name if name in fisher else tied.get(name, name)
            if held not in fisher:
                self.problems.add(
                    MissingTensor,
                    f"{safe_name(name)}: absent from the Fisher information of {label}. Exclude it to keep the values "
                    f"of {self.reference_label}, or compute the Fisher information of all parameters.",
                )
            elif fisher[held].shape != tensor.shape or fisher[held].dtype not in FLOATS:
                self.problems.add(
                    ShapeMismatch,
                    f"{safe_name(name)}: {tensor.dtype} {list(tensor.shape)} in {label}, its Fisher information is "
                    f"{fisher[held].dtype} {list(fisher[held].shape)}.",
                )
            else:
                weights.append(fisher[held])
        return tuple(weights)

    def dtypes_fit(self, name: str, tensors: Sequence[AnyTensor]) -> bool:
        floats = [t.dtype in FLOATS for t in tensors]
        labels = [self.reference_label, *self.labels]
        if all(floats):
            return True
        odd = next(i for i, is_float in enumerate(floats) if not is_float)
        if any(floats) or tensors[odd].dtype.startswith("F"):
            self.problems.add(
                UnsupportedDtype,
                f"{safe_name(name)}: {tensors[odd].dtype} in {labels[odd]}. pymerge merges {', '.join(FLOATS)}; "
                "quantised weights are never averaged: dequantise the model first, or exclude the tensor.",
            )
            return False
        return True

    def common_count(self, name: str, reference: AnyTensor, found: Sequence[AnyTensor]) -> int | None:
        """Entries to merge: all of them, or the rows common to all where the recipe allows that."""
        count = reference.numel
        wrong = [
            (label, t.shape) for (label, _, _), t in zip(self.others, found, strict=True) if t.shape != reference.shape
        ]
        if not wrong:
            return count
        shapes = ", ".join(f"{label} is {list(shape)}" for label, shape in wrong)
        text = f"{safe_name(name)}: {self.reference_label} is {list(reference.shape)}, {shapes}."
        vocabulary = reference.shape and all(s[1:] == reference.shape[1:] for _, s in wrong)
        if not (vocabulary and any(part in name for part in VOCABULARY)):
            self.problems.add(
                ShapeMismatch,
                f'{text} Merge models fine-tuned from one base, or exclude it: exclude: ["{safe_name(name)}"].',
            )
            return None
        if self.relaxations.get("vocabulary") == "base_rows":
            rows = min(reference.shape[0], *(s[0] for _, s in wrong))
            self.relax(f"vocabulary sizes differ, the first {rows} rows merged, the others copied", name)
            return count // max(1, reference.shape[0]) * rows
        self.problems.add(
            VocabMismatch,
            f"{text} Say `tokenizer_source: union` (or base, or a model) to put rows in order by their tokens, "
            "`relax: {vocabulary: base_rows}` to merge the common rows and keep the base's others, or exclude it.",
        )
        return None

    def check_extra(self, names: set[str]) -> None:
        how = self.relaxations.get("extra")
        for label, model, tied in self.others:
            for name in model:
                if name in names:
                    continue
                if name in self.reference_tied and name in tied:
                    self.notes.append(f"{safe_name(name)}: tied, yet stored in {label}; tied in the output")
                elif how is not None:
                    self.relax(f"only in {label}, " + ("dropped" if how == "drop" else "copied"), name)
                elif self.recipe.selects(name):
                    self.problems.add(
                        ExtraTensor,
                        f"{safe_name(name)}: in {label}, absent from {self.reference_label}. Say "
                        "`relax: {extra: drop}` or `{extra: copy}`, or exclude it.",
                    )

    def extra_copies(self, present: set[str]) -> list[Entry]:
        entries = []
        for model in self.models:
            for name in model.file_order():
                if name not in present:
                    present.add(name)
                    entries.append(self.copied(name, model[name]))
        return entries


def check(
    recipe: Recipe,
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    labels: Sequence[str],
    fisher: Sequence[Checkpoint] = (),
    statistics: Sequence[Statistics] = (),
) -> tuple[list[Entry], list[str]]:
    """Output entries in reading order, and notes for the summary. Raises one error that lists every problem."""
    checker = Checker(recipe, base, models, labels, fisher, statistics)
    entries = checker.run()
    checker.problems.raise_all()
    return entries, checker.notes


def tensor_counts(entries: Sequence[Entry]) -> Mapping[str, int]:
    """How many tensors are merged and copied."""
    merged = sum(entry.merged for entry in entries)
    return {"merged": merged, "copied": len(entries) - merged}
