"""Merge methods: one file each. `list` names them, `describe` explains one, `get` returns its class. No torch.

What a method of one's own is written with is here too: a base class (`ElementWiseCombine`, `MatrixCombine`, `Combine`,
`Purify`, `ElementWisePurify`, `Calibrate`), `param` for its hyperparameters, `DeltaRule` and `TensorInfo`, `TaskGroup`.
docs/own_method explains it with an example; `pymerge.testing.check_method` checks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pymerge.errors import RecipeError
from pymerge.methods import (
    ace,
    arcee_fusion,
    breadcrumbs,
    breadcrumbs_ties,
    cart,
    consensus,
    core_space,
    dare,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    emr,
    esm,
    esmpp,
    fisher,
    iso_c,
    iso_cts,
    karcher,
    knots,
    linear,
    lines,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    passthrough,
    pave,
    pcb,
    ram,
    ramplus_tl,
    regmean,
    regmean_plusplus,
    sce,
    slerp,
    star,
    svc,
    task_arithmetic,
    ties,
    trim,
    tsv_m,
    wudi,
)
from pymerge.methods.base import (
    REGISTRY,
    REQUIRED,
    STYLES,
    UNUSED,
    Auto,
    Calibrate,
    Combine,
    ElementWiseCombine,
    ElementWisePurify,
    LayerInput,
    MatrixCombine,
    Method,
    Notes,
    Param,
    PerModel,
    Purify,
    Style,
    TaskGroup,
    TensorInfo,
    param,
    per_task,
    register,
)
from pymerge.methods.names import nearest
from pymerge.methods.param import params_of
from pymerge.ops.delta_rule import DeltaRule

__all__ = [
    "REGISTRY",
    "REQUIRED",
    "STYLES",
    "UNUSED",
    "Auto",
    "Calibrate",
    "Combine",
    "DeltaRule",
    "ElementWiseCombine",
    "ElementWisePurify",
    "LayerInput",
    "MatrixCombine",
    "Method",
    "MethodInfo",
    "Notes",
    "Param",
    "ParamInfo",
    "PerModel",
    "Purify",
    "Style",
    "TaskGroup",
    "TensorInfo",
    "describe",
    "get",
    "list",
    "param",
    "per_task",
    "register",
]

_BUILT_IN = (
    linear,
    passthrough,
    task_arithmetic,
    slerp,
    ties,
    dare_linear,
    dare_ties,
    breadcrumbs,
    breadcrumbs_ties,
    consensus,
    pcb,
    fisher,
    emr,
    model_stock,
    nuslerp,
    multislerp,
    karcher,
    della,
    della_linear,
    sce,
    nearswap,
    arcee_fusion,
    ram,
    ramplus_tl,
    pave,
    dare,
    trim,
    tsv_m,
    iso_c,
    iso_cts,
    star,
    cart,
    wudi,
    ace,
    esm,
    esmpp,
    regmean,
    regmean_plusplus,
    knots,
    core_space,
    svc,
    lines,
)  # importing a module registers its method


@dataclass(frozen=True, kw_only=True)
class ParamInfo:
    """One hyperparameter in words. Defaults are None where the value must be given, "(unused)" where it must not."""

    name: str
    doc: str
    range: str
    default: Any
    mergekit_default: Any
    per_model: bool


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """One method in words."""

    name: str
    step: str
    summary: str
    paper: str
    needs: tuple[str, ...]
    base: str
    models: tuple[int, int | None]
    parameters: tuple[ParamInfo, ...]
    ignored: tuple[str, ...]
    package: str  # name and version of the package that brings it; "": pymerge itself


def get(name: str) -> type[Method]:
    """The class of a method; RecipeError with the nearest names where there is none, or where its package is broken."""
    try:
        return REGISTRY[name]
    except KeyError:
        raise RecipeError(f"unknown method {name!r}: {nearest(name, REGISTRY)}") from None


def describe(name: str) -> MethodInfo:
    """What a method does, takes and needs."""
    cls = get(name)
    combines = issubclass(cls, Combine)
    return MethodInfo(
        name=name,
        step=cls.step,
        summary=(cls.__doc__ or "").partition("\n")[0],
        paper=cls.paper,
        needs=cls.needs,
        base=cls.base_role if combines else "required",
        models=cls.models if combines else (1, None),
        parameters=tuple(
            ParamInfo(
                name=field,
                doc=p.doc,
                range=p.range,
                default=p.authors,
                mergekit_default=p.mergekit,
                per_model=p.per_model,
            )
            for field, p in params_of(cls).items()
        ),
        ignored=tuple(cls.ignored),
        package=cls.package,
    )


def list(step: str | None = None) -> tuple[str, ...]:
    """Names of the methods of one step (purify, combine or calibrate), or of all, in the order of the steps."""
    steps = (step,) if step else ("purify", "combine", "calibrate")
    return tuple(name for s in steps for name in sorted(REGISTRY.of_step(s)))
