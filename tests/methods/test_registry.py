"""Names, descriptions and the checks that all methods share (faults S38, S46, S47)."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from pymerge import methods
from pymerge.errors import RecipeError
from pymerge.methods.param import UNUSED
from pymerge.methods.ties import Ties

COMBINE = (
    "ace",
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "cart",
    "consensus",
    "core_space",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "emr",
    "esm",
    "esmpp",
    "fisher",
    "iso_c",
    "iso_cts",
    "karcher",
    "knots",
    "linear",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "pcb",
    "ram",
    "ramplus_tl",
    "regmean",
    "regmean_plusplus",
    "sce",
    "slerp",
    "star",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "wudi",
)
WEIGHTED = [  # by any finite number, negative ones too
    name
    for name in COMBINE
    if any(p.name == "weight" and p.range == "a finite number" for p in methods.describe(name).parameters)
]

WEIGHTED = [  # by any finite number, negative ones too
    name
    for name in COMBINE
    if any(p.name == "weight" and p.range == "a finite number" for p in methods.describe(name).parameters)
]


def test_list_names_methods_by_step() -> None:
    assert methods.list("combine") == COMBINE
    assert methods.list("purify") == ("dare", "pave", "trim") and methods.list("calibrate") == ("lines", "svc")
    assert methods.list() == ("dare", "pave", "trim", *COMBINE, "lines", "svc")


def test_describe() -> None:
    info = methods.describe("ties")
    assert (info.name, info.step, info.paper, info.needs, info.base) == (
        "ties",
        "combine",
        "arXiv 2306.01708",
        (),
        "required",
    )
    density = next(p for p in info.parameters if p.name == "density")
    assert (density.default, density.mergekit_default, density.range, density.per_model) == (
        0.2,
        1.0,
        "in [0, 1]",
        True,
    )
    normalize = next(p for p in info.parameters if p.name == "normalize")
    assert (normalize.default, normalize.mergekit_default, normalize.range) == (UNUSED, True, "true or false")
    assert methods.describe("slerp").models == (1, 1) and methods.describe("linear").base == "none"


def test_every_parameter_is_documented() -> None:
    for name in methods.list():
        info = methods.describe(name)
        assert info.summary and info.paper and all(p.doc and p.range for p in info.parameters), name


@pytest.mark.parametrize(("name", "near"), [("dare-ties", "dare_ties"), ("slrp", "slerp"), ("TIES", "ties")])
def test_unknown_name(name: str, near: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown method '{name}': did you mean .*{near}"):
        methods.get(name)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'ties' is registered already"):
        methods.register("ties")(Ties)


def test_all_ranges_in_one_error() -> None:
    with pytest.raises(RecipeError) as caught:
        Ties(density=(0.5, 2), scale=float("nan"), merge_func="avg", normalize=True)  # type: ignore[arg-type]
    assert str(caught.value).splitlines() == [
        "ties: density: must be in [0, 1], got 2",
        "ties: merge_func: must be one of mean, sum, max, got 'avg'",
        "ties: normalize: has no meaning in style authors, leave it out (divide by the weights of agreeing entries)",
        "ties: scale: must be a finite number, got nan",
    ]


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("weight", [float("nan"), float("inf"), (1.0, float("nan")), "x"])
def test_weights_must_be_finite_numbers(name: str, weight: Any) -> None:
    with pytest.raises(RecipeError, match=f"{name}: weight: must be a finite number"):
        methods.get(name)(weight=weight)


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan"), None])
def test_slerp_needs_t_between_its_ends(t: Any) -> None:
    with pytest.raises(RecipeError, match=r"slerp: t: must be (in \[0, 1\], got|given)"):
        methods.get("slerp")(t=t)


def test_misspelt_field_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="densty"):
        Ties(densty=0.5)  # type: ignore[call-arg]


def test_methods_are_frozen_and_comparable() -> None:
    with pytest.raises(FrozenInstanceError):
        Ties().scale = 2.0  # type: ignore[misc]
    assert Ties(density=0.5) == Ties(density="5e-1") and hash(Ties(density=(0.1, 0.2))) == hash(
        Ties(density=[0.1, 0.2])
    )  # type: ignore[arg-type]


def test_mergekit_style_requires_weights() -> None:
    with pytest.raises(RecipeError, match="ties: weight: must be given"):
        Ties(style="mergekit")


def test_methods_need_no_torch() -> None:
    code = "import sys, pymerge.methods as m; m.describe('ties'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
