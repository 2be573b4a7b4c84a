"""pymerge's methods in mergekit's registry (0.1.5): `merge_method: pymerge_ace` in any mergekit YAML.

    from pymerge.integrations.mergekit import register
    register()  # then mergekit's run_merge, merge_state_dicts or merge_tensors

or the command `pymerge-mergekit-yaml CONFIG OUT`. mergekit reads, aligns and writes; it gives one tensor of all models
at a time, which pymerge merges as it would in a merge of its own.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator
from torch import Tensor

from pymerge import methods
from pymerge.errors import RecipeError
from pymerge.integrations.one_tensor import BESIDE, Input, hyperparameters, merge_one, steps_of, why_not
from pymerge.methods.base import Combine
from pymerge.methods.matrices import RESTS
from pymerge.methods.param import REQUIRED, STYLES, Param

try:
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import (
        MISSING,
        BasePolicy,
        GroupMergeMethod,
        InputContract,
        MergeMethodSpec,
        ParameterScope,
        ParameterSpec,
        PerInputValues,
        TensorEntry,
        TensorGroup,
    )
except ImportError as error:  # absent, or 0.1.4 and older, whose registry and parameters (no text) are others
    raise ImportError(f'mergekit 0.1.5 is needed ({error}): pip install "pymerge[mergekit]"') from error

PREFIX = "pymerge_"
ROLES = {
    "required": BasePolicy.REQUIRED,
    "optional": BasePolicy.OPTIONAL,
    "none": BasePolicy.IGNORED,
    "first": BasePolicy.REQUIRED,
}


def register(accelerate_stock: bool = False) -> tuple[str, ...]:
    """Registers every method that can merge one tensor at a time, under `pymerge_NAME`; returns these names. Calling it
    again changes nothing.

    accelerate_stock  mergekit's own ties, breadcrumbs and della rank magnitudes by pymerge's operators, with the same
                      result up to which of equal magnitudes are kept; `mergekit_stock.restore()` undoes it
    Raises   ValueError where another program has registered a method of such a name"""
    names = []
    for cls in steps_of("combine").values():
        assert issubclass(cls, Combine)
        method = PymergeMethod(cls)
        names.append(method.spec.name)
        if not any(isinstance(one, PymergeMethod) and one.combine is cls for one in registry.registered_methods()):
            registry.register(method)
    if accelerate_stock:
        from pymerge.integrations import mergekit_stock

        mergekit_stock.accelerate()
    return tuple(names)


def not_registered() -> dict[str, str]:
    """The methods that mergekit cannot run, each with the reason."""
    return {name: reason for name in methods.list() if (reason := why_not(methods.get(name))) is not None}


class PymergeMethod(GroupMergeMethod):
    """One combine method of pymerge as mergekit knows methods."""

    def __init__(self, combine: type[Combine]) -> None:
        self.combine = combine
        least, most = combine.models
        counts: dict[str, Any] = {"min_non_base": least, "max_non_base": most}
        if combine.base_role == "none":  # a base is a model like any other
            counts = {"min_inputs": least, "max_inputs": most}
        self.spec = MergeMethodSpec(
            name=PREFIX + combine.name,
            pretty_name=f"{combine.name} (pymerge)",
            reference_url=combine.paper.replace("arXiv ", "https://arxiv.org/abs/") or None,
            parameters=parameters_of(combine),
            contract=InputContract(base=ROLES[combine.base_role], **counts),
        )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """The merged tensor, of the inputs' dtype: rounded once, as in a merge by pymerge with this `dtype`."""
        ignored = self.spec.contract.base == BasePolicy.IGNORED
        base, models = (None, group.entries) if ignored else (group.base, group.non_base)
        given = {
            name: value.values_for(models) if isinstance(value, PerInputValues) else value
            for name, value in parameters.items()
        }
        if ignored and group.base is not None and parameters.get("weight", {}).get(group.base.id, 0) is None:
            raise RecipeError(
                f"{self.spec.name} averages the base like any other model: list it with its weight, or drop base_model"
            )
        return merge_one(
            self.combine.name,
            group.metadata.name or "tensor",
            input_of(base) if base is not None else None,
            [input_of(entry) for entry in models],
            given,
            torch.get_num_threads(),
        )


def input_of(entry: TensorEntry) -> Input:
    """mergekit's references to folders say where the tensors come from."""
    model = getattr(entry.id, "model", None)
    folder = getattr(model, "path", None)
    known = isinstance(folder, str) and os.path.isdir(folder) and getattr(entry.id, "lora", None) is None
    return Input(label=str(entry.id), tensor=entry.tensor, folder=folder if known else None)


def parameters_of(combine: type[Combine]) -> tuple[ParameterSpec, ...]:
    """The parameters that mergekit looks up, filters and grades; a value that is not given is None."""
    per_model = ParameterScope.INPUT if combine.base_role == "none" else ParameterScope.NON_BASE
    name_of = PREFIX + combine.name
    specs = []
    for name, param in hyperparameters(combine).items():
        required = param.authors is REQUIRED and param.mergekit is REQUIRED
        specs.append(
            ParameterSpec(
                name,
                checked(f"{name_of}: {name}", param),
                per_model if param.per_model else ParameterScope.SHARED,
                default=MISSING if required else None,
                description=param.doc,
            )
        )
    for name, param in OF_THE_RECIPE.items():
        specs.append(ParameterSpec(name, checked(f"{name_of}: {name}", param), ParameterScope.SHARED, None, param.doc))
    for name, (_, doc) in BESIDE.items():
        specs.append(ParameterSpec(name, checked(f"{name_of}: {name}", text(doc)), per_model, None, doc))
    return tuple(specs)


def checked(where: str, param: Param) -> Any:
    """A type for pydantic: pymerge's check of the value, with pymerge's message."""

    def convert(value: Any) -> Any:
        try:
            return None if value is None else param.convert(value)
        except ValueError as error:
            raise RecipeError(f"{where}: {error}") from None

    return Annotated[Any, BeforeValidator(convert)]


def text(doc: str, choices: tuple[str, ...] | None = None) -> Param:
    return Param(doc=doc, kind=str, authors=None, mergekit=None, choices=choices)


# What a recipe says beside hyperparameters; `filter` says for which tensors.
OF_THE_RECIPE: dict[str, Param] = {
    "purify": text("steps before the merge, a comma between several"),
    "calibrate": text("steps behind the merge, a comma between several"),
    "style": text("whose formula and defaults", STYLES),
    "seed": Param(doc="of random masks", kind=int, authors=0, mergekit=0, low=0),
    "spectral": Param(doc="a weight matrix or not; its name decides", kind=bool, authors=None, mergekit=None),
    "rest": text("what tensors that are no weight matrices get", RESTS),
    "split": Param(doc="equal parts that a fused matrix is merged in", kind=int, authors=None, mergekit=None, low=2),
}
