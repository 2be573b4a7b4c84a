"""Many merges in one pass: each folder holds the bytes that a merge of its own writes, and inputs are read once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from pymerge.checkpoint.read import WeightFile
from pymerge.engine.local import merge_to_disk
from pymerge.engine.many import Pass, Setting, merge_many
from pymerge.engine.plan import SLACK, Options
from pymerge.recipe import Recipe
from tests.engine.observed import SHAPES, saved, statistics_of
from tests.models import family, read_model, same, write_model

TASKS = 3
SMALL = Options(threads=2, memory=SLACK + (80 << 20))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], list[Path]]:
    folder = tmp_path_factory.mktemp("models")
    base, tuned = family(folder, TASKS, SHAPES | {"positions": (4,)}, torch.bfloat16)
    for path in (base, *tuned):
        write_model(path, read_model(path) | {"positions": torch.arange(4)})
    return base, tuned, saved([statistics_of(t, path=path) for t, path in enumerate(tuned)], folder)


def at(models: Any, name: str, keys: dict[str, Any], values: dict[str, float]) -> Recipe:
    base, tuned, statistics = models
    needs = "covariance" in pymerge.methods.describe(name).needs or keys.get("purify") == "pave"
    beside = {"statistics": statistics} if needs else {}
    base = base if pymerge.methods.get(name).base_role == "required" else None
    return Recipe.from_kwargs(base, tuned, name, **beside, **keys, **values)


def settings_of(models: Any, name: str, values: Sequence[dict[str, float]], folder: Path, **keys: Any) -> list[Setting]:
    found = []
    folder.mkdir(exist_ok=True)
    for value in values:
        label = ",".join(f"{key}={number}" for key, number in value.items())
        unscaled = at(models, name, keys, value | {"scale": 1.0}) if "scale" in value else None
        own = at(models, name, keys, value)
        found.append(Setting(label=label, recipe=own, unscaled=unscaled, out=folder / label))
    return found


@contextmanager
def bytes_read() -> Iterator[list[int]]:
    """Of models' weight files, by everybody inside."""
    read_into, counted = WeightFile.read_into, []

    def counting(self: WeightFile, view: memoryview, offset: int) -> None:
        if ".stats." not in str(self.path):
            counted.append(len(view))
        read_into(self, view, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightFile, "read_into", counting)
        yield counted


def check_same(
    settings: Sequence[Setting], folder: Path, options: Options = SMALL, passes: int = 1, reads: bool = True
) -> list[Pass]:
    """Every file of every folder but for times; what all read together is what the greediest alone reads."""
    with bytes_read() as together:
        found = merge_many(settings, options)
    assert len(found) == passes and sum(one.outputs for one in found) == len(settings)
    alone_read, tensors = [], []
    for setting in settings:
        with bytes_read() as alone:
            wanted = merge_to_disk(setting.recipe, folder / "alone" / setting.label, options)
        alone_read.append(sum(alone))
        own = json.loads((setting.out / "merge.json").read_text())
        untimed = {"date", "seconds", "peak_rss_bytes"}
        assert {k: v for k, v in own.items() if k not in untimed} == json.loads(
            json.dumps({k: v for k, v in wanted.items() if k not in untimed})
        ), setting.label
        names = {path.name for path in setting.out.iterdir()}
        assert names == {path.name for path in (folder / "alone" / setting.label).iterdir()}
        for name in names - {"merge.json"}:
            assert (setting.out / name).read_bytes() == (folder / "alone" / setting.label / name).read_bytes(), name
        tensors.append(read_model(setting.out))
    assert not any(same(a, b) for i, a in enumerate(tensors) for b in tensors[:i])  # the settings matter
    if reads:
        assert sum(together) == max(alone_read)
    return found


def grid(**axes: Sequence[float]) -> list[dict[str, float]]:
    found: list[dict[str, float]] = [{}]
    for name, values in axes.items():
        found = [one | {name: value} for one in found for value in values]
    return found


CASES: dict[str, tuple[str, list[dict[str, float]], dict[str, Any]]] = {
    "ties of the whole model": ("ties", grid(density=(0.1, 0.4, 1.0), scale=(0.5, 1.2)), {"scope": "global"}),
    "ties of a tensor": ("ties", grid(density=(0.1, 0.4, 1.0), scale=(0.5, 1.2)), {"scope": "tensor"}),
    "ties, no scale": ("ties", grid(density=(0.1, 0.4)), {"scope": "tensor", "out_dtype": "float32"}),
    "random masks": ("dare_ties", grid(density=(0.1, 0.4), scale=(0.5, 1.2)), {}),
    "rows": ("breadcrumbs", grid(gamma=(0.01, 0.2), density=(0.5, 0.7)), {}),
    "one scale each": ("task_arithmetic", grid(scale=(0.5, 1.0, 1.2)), {}),
    "no base": ("linear", grid(weight=(0.2, 0.3)), {"normalize": False}),
    "decomposed once": ("tsv_m", grid(scale=(0.5, 1.0, 1.2)), {"out_dtype": "float32"}),
    "decomposed for each share": ("iso_cts", grid(common_space_fraction=(0.5, 0.8), scale=(0.5, 1.2)), {}),
    "parts and joins": (
        "iso_c",
        grid(scale=(0.5, 1.2)),
        {"split": {"*.in_proj_weight": 3}, "join": [["layers.0.q.weight", "layers.0.k.weight"]]},
    ),
    "statistics": ("ace", grid(scale=(0.5, 1.2)), {}),
    "questions of the whole model": ("pcb", grid(ratio=(0.1, 0.4), scale=(0.5, 1.2)), {}),
    "several questions": ("consensus", grid(threshold=(0.2, 0.6)), {}),
    "calibrated behind the scale": ("task_arithmetic", grid(scale=(0.5, 1.2)), {"calibrate": "svc"}),
    "purified, then ranked": ("ties", grid(density=(0.2, 0.5), scale=(0.5, 1.2)), {"purify": "pave"}),
    "a copy and another dtype": ("ties", grid(density=(0.2, 0.5)), {"exclude": ["embed*"], "out_dtype": "float32"}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_bytes_of_single_merges(case: Any, models: Any, tmp_path: Path) -> None:
    name, values, keys = case
    check_same(settings_of(models, name, values, tmp_path / "many", **keys), tmp_path)
