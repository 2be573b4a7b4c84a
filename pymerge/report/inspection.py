"""`pymerge.inspect`: what fine-tuning did to a base's weights, and how the updates of several models go together."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from operator import add
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint import Checkpoint, safe_name
from pymerge.checkpoint.header import name_list
from pymerge.checkpoint.quantised import quantised
from pymerge.checkpoint.tied import tied_pairs
from pymerge.engine.check import FLOATS
from pymerge.engine.expert_matrices import expert_parts
from pymerge.engine.local import open_inputs
from pymerge.engine.moments import Compared, Moments, sweep
from pymerge.engine.network import offline
from pymerge.engine.plan import Options
from pymerge.engine.progress import make_progress
from pymerge.errors import InputError, RecipeError, UnsupportedDtype
from pymerge.methods.matrices import Matrices
from pymerge.recipe import Recipe
from pymerge.recipe.references import refuse_base
from pymerge.recipe.stacks import LayerName
from pymerge.report.spectra import MatrixOf, Spectrum, decompose

if TYPE_CHECKING:
    from pymerge.engine.local import Inputs
    from pymerge.report.suggestions import Suggestion

RANK = 16
NUMBER = re.compile(r"(^|\.)\d+(?=\.)")


@dataclass(frozen=True)
class TensorFound:
    """What is known of one tensor; spectra: of its matrix, or of those of its experts."""

    name: str
    shape: tuple[int, ...]
    moments: Moments
    spectra: tuple[Spectrum, ...] = ()

    @property
    def kind(self) -> str:
        """The name with stars for numbers: equal for the same tensor of all layers."""
        return NUMBER.sub(r"\1*", self.name)

    @property
    def layer(self) -> tuple[str, int] | None:
        """Stack of layers, and the number in it; None outside of all layers."""
        found = LayerName.of(self.name)
        return (found.stack, found.number) if found else None


@dataclass(frozen=True)
class Group:
    """Tensors taken together: of a kind, of a layer, or all."""

    moments: Moments
    spectra: tuple[Spectrum, ...]
    tensors: int

    @classmethod
    def of(cls, tensors: Sequence[TensorFound]) -> Group:
        moments = reduce(add, (tensor.moments for tensor in tensors))
        return cls(moments, tuple(s for tensor in tensors for s in tensor.spectra), len(tensors))


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `pymerge.inspect` found.

    base, models  what they are called
    tensors       in the order of the base's files
    left_out      name -> why it was not compared
    rank          singular values looked for in each matrix; 0: none
    bytes_read, seconds
    suggestions   what this suggests, with the rule that says so"""

    base: str
    models: tuple[str, ...]
    tensors: tuple[TensorFound, ...]
    left_out: dict[str, str]
    notes: tuple[str, ...]
    rank: int
    bytes_read: int
    seconds: float
    suggestions: tuple[Suggestion, ...] = field(default=(), repr=False)

    @cached_property
    def whole(self) -> Group:
        return Group.of(self.tensors)

    def by(self, key: Callable[[TensorFound], Any]) -> dict[Any, Group]:
        """Groups of the tensors for which the key is not None, in the order of the files."""
        found: dict[Any, list[TensorFound]] = {}
        for tensor in self.tensors:
            if (of := key(tensor)) is not None:
                found.setdefault(of, []).append(tensor)
        return {of: Group.of(tensors) for of, tensors in found.items()}

    @cached_property
    def kinds(self) -> dict[str, Group]:
        return self.by(lambda tensor: tensor.kind)

    @cached_property
    def layers(self) -> dict[tuple[str, int], Group]:
        """(stack, number) -> group, by depth."""
        found = self.by(lambda tensor: tensor.layer)
        stacks = list(dict.fromkeys(stack for stack, _ in found))
        return dict(sorted(found.items(), key=lambda item: (stacks.index(item[0][0]), item[0][1])))

    def untouched(self, task: int | None = None) -> list[str]:
        """Tensors that a model left as they are in the base, bit for bit up to the sign of zeros; None: all models."""
        tasks = range(len(self.models)) if task is None else (task,)
        return [t.name for t in self.tensors if all(t.moments.both[i, i] == 0 for i in tasks)]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data for json."""
        from pymerge.report.plain import plain

        return plain(self)


def inspect(
    base: Any,
    models: Sequence[Any],
    *,
    spectra: bool = True,
    rank: int = RANK,
    exclude: Sequence[str] = (),
    options: Options | None = None,
) -> Inspection:
    """Compare fine-tuned models with their base, tensor by tensor, in bounded memory.

    base, models  paths (Hugging Face folders, .safetensors files, PEFT adapters), or state dicts or modules
    spectra       also the leading `rank` singular values and directions of each update of a linear layer's matrix
                  (embeddings, heads and other tables are left out), with how many of them are proven
    exclude       name patterns of tensors to leave out
    options       memory, threads, progress, prefer, allow_pickle (pymerge.Options)
    Returns       Inspection; `to_dict()` is plain data. Tensors that are no floats, or that a model lacks or has in
                  another shape, are listed in `left_out`.
    Raises        RecipeError (paths, rank, memory); InputError and its subclasses: files, quantised weights, nothing to
                  compare; NonFinite
    Cost          all bytes once; with spectra those of the matrices again, and a truncated SVD of each at `rank`"""
    from pymerge.report.suggestions import suggest

    if rank < 1:
        raise RecipeError(f"rank must be at least 1, got {rank}")
    if base is None or not models:
        raise RecipeError("inspect needs a base and one fine-tuned model at least")
    refuse_base(base, models, "compare")
    started, options = time.monotonic(), options or Options()
    patterns = {"exclude": list(exclude)} if exclude else {}
    recipe = Recipe.from_kwargs(base, list(models), "task_arithmetic", **patterns)
    with ExitStack() as stack:
        inputs = open_inputs(recipe, options, stack)
        options = offline(options, inputs.base, inputs.models, (), ())
        compared, left_out = matched(recipe, inputs)
        matrices = {name: matrices_of(inputs.reference, name, c) for name, c in compared.items()} if spectra else {}
        labels = ("base", *inputs.labels)
        total = sum(t.nbytes for c in compared.values() for t in c.inputs)
        total += sum(matrix.bytes for found in matrices.values() for matrix in found)
        with make_progress(total, options.progress, len(compared)) as progress:
            limits = {"threads": options.thread_count, "memory": options.memory_bytes, "progress": progress}
            wanted = [matrix for found in matrices.values() for matrix in found]
            moments = sweep(list(compared.values()), labels, **limits)
            spectrum = iter(decompose(wanted, rank, **limits))
            tensors = tuple(
                TensorFound(name, c.base.shape, m, tuple(next(spectrum) for _ in matrices.get(name, ())))
                for (name, c), m in zip(compared.items(), moments, strict=True)
            )
        inputs.check_unchanged()
    found = Inspection(
        base=recipe.base.path if recipe.base is not None else "base",
        models=inputs.labels,
        tensors=tensors,
        left_out=left_out,
        notes=tuple(inputs.notes),
        rank=rank if spectra else 0,
        bytes_read=total,
        seconds=time.monotonic() - started,
    )
    return replace(found, suggestions=tuple(suggest(found)))


def matched(recipe: Recipe, inputs: Inputs) -> tuple[dict[str, Compared], dict[str, str]]:
    """The tensors that base and all models have, and why others are left out."""
    base = inputs.base
    assert base is not None
    labelled = {"base": base} | dict(zip(inputs.labels, inputs.models, strict=True))
    if problems := quantised(labelled, recipe.selects):
        raise UnsupportedDtype("\n".join(problems))
    ties = [tied_pairs(model) for model in inputs.models]
    compared: dict[str, Compared] = {}
    left_out: dict[str, str] = {}
    for name in base.file_order():
        held = [model.get(name, model.get(tied.get(name, ""))) for model, tied in zip(inputs.models, ties, strict=True)]
        why = "excluded" if not recipe.selects(name) else unfit(base, name, inputs.labels, held)
        if why is None:
            compared[name] = Compared(base[name], tuple(tensor for tensor in held if tensor is not None))
        else:
            left_out[name] = why
    for label, model in zip(inputs.labels, inputs.models, strict=True):
        left_out |= {name: f"only in {label}" for name in model if name not in base and name not in left_out}
    if not compared:
        listed = "; ".join(f"{safe_name(name)}: {why}" for name, why in list(left_out.items())[:8])
        raise InputError(
            f"no tensor of floats that base and models share in name and shape: {listed or 'the base is empty'}. "
            f"Compare models that were fine-tuned from this base (it has {name_list(list(base), 4) or 'no tensors'})"
        )
    return compared, left_out


def unfit(base: Checkpoint, name: str, labels: Iterable[str], held: Sequence[Any]) -> str | None:
    """Why a tensor cannot be compared; None: it can."""
    reference = base[name]
    if reference.dtype not in FLOATS:
        return f"{reference.dtype}, no floats"
    if reference.numel == 0:
        return "empty"
    for label, tensor in zip(labels, held, strict=True):
        if tensor is None:
            return f"absent from {label}"
        if tensor.dtype not in FLOATS:
            return f"{tensor.dtype} in {label}, no floats"
        if tensor.shape != reference.shape:
            return f"{list(tensor.shape)} in {label}, {list(reference.shape)} in the base"
    return None


def matrices_of(reference: Checkpoint, name: str, compared: Compared) -> tuple[MatrixOf, ...]:
    """The matrices of linear layers that a tensor holds."""
    known, shape = Matrices(), compared.base.shape
    if known.has(name, shape):
        return (MatrixOf(name, compared, (shape[0], shape[1])),)
    if known.has_stacked(name, shape):
        return tuple(MatrixOf(part.name, compared, part.shape, part.first) for part in expert_parts(reference, name))
    return ()
