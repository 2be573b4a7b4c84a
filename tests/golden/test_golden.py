"""Every golden file against pymerge: the steps of its recipe on tensors, and the whole merge in memory.

PYMERGE_GOLDEN_DIR names another folder of golden files (default: the selection beside this test).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pymerge
from pymerge.methods.base import ElementWiseCombine, TensorInfo, chain_rule
from pymerge.ops import _reference, delta
from pymerge.ops.delta_rule import mask_key
from pymerge.recipe import Recipe
from tests.golden.cases import FOLDER, NOT_BUILT, Golden, delta_error, golden_files, read_golden, recipe_of

FILES = golden_files()


def merged_by_steps(golden: Golden, name: str, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Each tensor by its rule; with scope "global" all tensors, sorted by name, as one."""
    uses_base = golden.with_base
    recipe = Recipe.from_kwargs(golden.base if uses_base else None, golden.tasks, name, **arguments)
    steps = recipe.steps_for("", 0.0)
    assert isinstance(steps.combine, ElementWiseCombine)
    names = sorted(golden.base)
    if steps.combine.survey_scope == "model":
        flat = [torch.cat([model[n].flatten() for n in names]) for model in (golden.base, *golden.tasks)]
        info = TensorInfo(name="", shape=tuple(flat[0].shape), tasks=len(golden.tasks))
        whole = delta.merge_by_rule(chain_rule((), steps.combine, info), flat[0], flat[1:], add=flat[0])
        parts = whole.split([golden.base[n].numel() for n in names])
        return {n: part.view_as(golden.base[n]) for n, part in zip(names, parts, strict=True)}
    merged = {}
    for n in names:
        info = TensorInfo(name=n, shape=tuple(golden.base[n].shape), tasks=len(golden.tasks))
        base = golden.base[n] if uses_base else None
        tuned = [task[n] for task in golden.tasks]
        merged[n] = delta.merge_by_rule(chain_rule((), steps.combine, info), base, tuned, add=base)
    return merged


def is_rule(name: str, arguments: dict[str, Any]) -> bool:
    return issubclass(pymerge.methods.get(name), ElementWiseCombine) and not arguments.get("calibrate")


def merged_whole(golden: Golden, models: list[dict[str, torch.Tensor]], **changes: Any) -> dict[str, torch.Tensor]:
    """By the public function, in memory; models are the base and the tasks."""
    name, arguments = recipe_of(golden)
    base, *tasks = models
    return pymerge.merge(base if golden.with_base else None, tasks, method=name, **arguments, **changes)


def use_masks(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's masks in place of the random draw: the references run, with a keep-mask looked up by key."""
    masks = {
        mask_key(0, n, t): mask.flatten().bool() for t, model in enumerate(golden.masks) for n, mask in model.items()
    }
    monkeypatch.setattr(_reference, "random_mask", lambda keep, key, index: masks[key & (2**64 - 1)][index])
    names = ("delta_merge", "delta_l1", "delta_signs", "delta_kth")
    references = {name: getattr(importlib.import_module(f"pymerge.ops.{name}"), f"{name}_reference") for name in names}
    monkeypatch.setattr(torch.ops, "pymerge", SimpleNamespace(**references))


def test_there_are_golden_files() -> None:
    assert FILES, f"no golden files in {FOLDER}"


def test_nothing_that_is_built_is_listed_as_missing() -> None:
    listed = {variant or folder for folder, _, variant in NOT_BUILT}
    assert listed.isdisjoint(pymerge.methods.list())


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_golden(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = read_golden(path)
    if golden.not_built:
        pytest.skip(f"not built yet: {golden.not_built}")
    name, arguments = recipe_of(golden)
    if golden.masks:
        use_masks(golden, monkeypatch)
    if is_rule(name, arguments):
        for n, mine in merged_by_steps(golden, name, arguments).items():
            assert delta_error(mine, golden, n) <= golden.bound(n), n
    if not golden.masks:  # the native mask cannot be replaced from outside
        for n, mine in merged_whole(golden, [golden.base, *golden.tasks]).items():
            assert delta_error(mine, golden, n) <= golden.bound(n), n


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_golden_inputs_in_bfloat16(path: Path) -> None:
    """Rounded inputs give what the same numbers give in float32, to the bit: they are widened before anything else."""
    golden = read_golden(path)
    if golden.not_built or golden.masks:
        pytest.skip(
            f"not built yet: {golden.not_built}" if golden.not_built else "the mask cannot be given from outside"
        )
    stored = [{n: t.bfloat16() for n, t in model.items()} for model in (golden.base, *golden.tasks)]
    wide = [{n: t.float() for n, t in model.items()} for model in stored]
    narrow = merged_whole(golden, stored, out_dtype="float32")
    for n, expected in merged_whole(golden, wide).items():
        assert torch.equal(narrow[n], expected), n
