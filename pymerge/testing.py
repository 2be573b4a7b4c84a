"""For the tests of methods: what pymerge's engine relies on, checked on small random models."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pymerge
from pymerge.errors import RecipeError
from pymerge.methods import Combine, ElementWiseCombine, Method, TaskGroup, TensorInfo, describe, get
from pymerge.methods.surveyed import SurveyedCombine

Model = Mapping[str, Tensor]
SHAPES = {  # weight matrices (wide, tall), a convolution, an embedding, a vector, a scalar, nothing
    "layers.0.up.weight": (12, 40),
    "layers.1.up.weight": (40, 12),
    "conv.weight": (4, 3, 3, 3),
    "embed.weight": (20, 12),
    "norm.weight": (12,),
    "temperature": (),
    "nothing.weight": (0, 12),
}
FOLDER, SCALE = "model.safetensors", 0.3


def check_method(name: str, *, tasks: int = 3, **hyperparameters: Any) -> None:
    """Checks that a method keeps what pymerge promises of every method; AssertionError says what it does not.

    It is documented; the same inputs give the same bits, from memory and from disk, in float32 and in bfloat16; inputs
    stay as they are; results are shaped like the base; models equal to the base give the base; its
    `scale` multiplies its update last; where it is given rows or entries alone (`unit`), they come out as among others.

    name             as recipes call it; a purify or calibrate step is checked around task_arithmetic
    hyperparameters  those without a default, or others than the defaults
    Raises           AssertionError; what the merge raises (NaN, Inf); RecipeError for methods that need statistics or
                     adapters, or leave files behind."""
    cls, about = get(name), describe(name)
    if cls.needs or getattr(cls, "beside", ""):
        what = ", ".join(cls.needs) or getattr(cls, "beside", "")
        raise RecipeError(f"{name}: check_method merges plain models, this method has to do with {what}")
    assert about.summary, f"{name}: the class has no docstring; its first line is what `pymerge methods` shows"
    undocumented = [p.name for p in about.parameters if not p.doc]
    assert not undocumented, f"{name}: hyperparameters without a word of explanation: {undocumented}"
    tasks = max(about.models[0], min(tasks, about.models[1] or tasks))
    base, *tuned = (random_model(seed) for seed in range(1 + tasks))
    for dtype in (torch.float32, torch.bfloat16):
        stored = [{key: value.to(dtype) for key, value in model.items()} for model in (base, *tuned)]
        check_merge(name, stored[0], stored[1:], hyperparameters)
    step = cls(**hyperparameters)
    check_costs(step, tasks)
    if isinstance(step, Combine):
        check_scale(name, base, tuned, hyperparameters)
        if step.unit != "tensor" and not isinstance(step, ElementWiseCombine | SurveyedCombine):
            check_parts(step, base["layers.0.up.weight"], [model["layers.0.up.weight"] for model in tuned])


def random_model(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def merged(name: str, base: Any, tuned: Sequence[Any], hyperparameters: Mapping[str, Any], **more: Any) -> Any:
    """pymerge.merge by a method, or by task arithmetic with a purify or calibrate step."""
    step = get(name).step
    if step == "combine":
        averages = describe(name).base == "none"
        return pymerge.merge(None if averages else base, tuned, method=name, **hyperparameters, **more)
    around = {step: {"method": name, **hyperparameters}}
    return pymerge.merge(base, tuned, method="task_arithmetic", **around, **more)


def check_merge(name: str, base: Model, tuned: Sequence[Model], hyperparameters: Mapping[str, Any]) -> None:
    """Two merges in memory, one on disk, one of models that equal the base."""
    before = [{key: value.clone() for key, value in model.items()} for model in (base, *tuned)]
    once, again = (merged(name, base, tuned, hyperparameters) for _ in range(2))
    changed = [key for old, new in zip(before, (base, *tuned), strict=True) for key in differing(old, new)]
    assert not changed, f"{name}: writes over its inputs: {changed}; work on copies"
    assert not differing(once, again), f"{name}: two runs differ in {differing(once, again)}; take randomness from seed"
    for key, value in once.items():
        assert value.shape == base[key].shape, f"{name}: {key} {list(base[key].shape)} becomes {list(value.shape)}"
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, str(i)) for i in range(1 + len(tuned))]
        for path, model in zip(paths, (base, *tuned), strict=True):
            path.mkdir()
            save_file(dict(model), path / FOLDER, metadata={"format": "pt"})
        merged(name, paths[0], paths[1:], hyperparameters, out=Path(folder, "out"))
        streamed = load_file(Path(folder, "out", FOLDER))
    assert not differing(once, streamed), f"{name}: on disk otherwise than in memory: {differing(once, streamed)}"
    same = merged(name, base, [{k: v.clone() for k, v in base.items()} for _ in tuned], hyperparameters)
    far = [key for key in base if not torch.allclose(same[key].float(), base[key].float(), rtol=1e-5, atol=1e-6)]
    assert not far, f"{name}: models that equal the base do not give the base: {far}"


def differing(a: Model, b: Model) -> list[str]:
    """Names of tensors that are not equal bit for bit."""
    return [key for key in {**a, **b} if key not in a or key not in b or not torch.equal(a[key], b[key])]


def check_costs(step: Method, tasks: int) -> None:
    """What plans ask for before a merge."""
    for shape in SHAPES.values():
        if step.spectral and len(shape) != 2:
            continue
        info = TensorInfo(name="any", shape=shape, tasks=tasks)
        assert step.workspace(info) >= 0, f"{step.name}: workspace of {list(shape)} is negative"
        assert min(step.work(info)) >= 0, f"{step.name}: work of {list(shape)} is negative"


def check_scale(name: str, base: Model, tuned: Sequence[Model], hyperparameters: Mapping[str, Any]) -> None:
    """A search over the scale merges once and multiplies: that must give the bits of a merge at the scale."""
    if "scale" not in {p.name for p in describe(name).parameters} or describe(name).base != "required":
        return
    zero = {key: torch.zeros_like(value) for key, value in base.items()}
    update, scaled = (merged(name, zero, tuned, {**hyperparameters, "scale": s}) for s in (1.0, SCALE))
    wanted = pymerge.merge(zero, [update], method="task_arithmetic", scale=SCALE)
    assert not differing(wanted, scaled), f"{name}: scale is not what the update is multiplied by, last of all"


def check_parts(step: Combine, base: Tensor, tuned: Sequence[Tensor]) -> None:
    """The engine gives rows, or entries, of large tensors piece by piece."""
    tuned = [base, *tuned] if step.base_role == "first" else tuned
    info = TensorInfo(name="w", shape=tuple(base.shape), tasks=len(tuned))
    subtracted = base if step.subtracts(True) else None
    whole = step.combine(TaskGroup(info=info, base=subtracted, tuned=tuple(tuned)))
    for rows in (slice(0, 5), slice(5, len(base))):
        part = TaskGroup(
            info=info,
            base=None if subtracted is None else base[rows],
            tuned=tuple(t[rows] for t in tuned),
            first=rows.start * base.shape[1],
        )
        text = f"{step.name}: unit is {step.unit!r}, yet rows {rows.start}..{rows.stop} alone come out otherwise"
        assert torch.equal(step.combine(part), whole[rows]), text
