"""Many merges in one pass: each folder holds the bytes that a merge of its own writes, and inputs are read once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from pymerge.checkpoint.read import WeightFile
from pymerge.engine.local import merge_to_disk
from pymerge.engine.many import Pass, Setting, grouped, merge_many, planned_many, why_apart
from pymerge.engine.plan import SLACK, Options
from pymerge.engine.several import SeveralExecutor
from pymerge.engine.side_by_side import together
from pymerge.errors import NonFinite, Overflow, RecipeError
from pymerge.recipe import Recipe
from tests.adapters import SHAPES as ADAPTED
from tests.adapters import random_factors, write_adapter
from tests.engine.live_models import batch_for, children
from tests.engine.observed import SHAPES, saved, statistics_of
from tests.models import family, random_tensors, read_model, same, write_model

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
    beside = {"statistics": statistics} if needs and "data" not in keys else {}
    base = None if name == "linear" else base
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
        untimed = {"date", "seconds", "busy_seconds", "peak_rss_bytes"}
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


def test_a_tensor_that_does_not_fit_is_surveyed_in_tiles(tmp_path: Path) -> None:
    base, tuned = family(tmp_path, TASKS, {"w": (2500, 1024), "v": (3, 5)}, torch.bfloat16)
    settings = settings_of(
        (base, tuned, []), "ties", grid(density=(0.1, 0.4), scale=(0.5, 1.2)), tmp_path / "many", scope="tensor"
    )
    settings += settings_of(
        (base, tuned, []), "ties", grid(density=(1.0,), scale=(0.5, 1.2)), tmp_path / "many", scope="tensor"
    )
    options = replace(SMALL, memory=SLACK + (72 << 20))
    with planned_many(settings, options) as (inputs, plans):
        (group,) = grouped(settings, inputs, plans, options)
        modes = {item.entry.name: item.mode for item in together(group, options).reading.items}
    assert modes == {"w": "swept", "v": "held"}
    check_same(settings, tmp_path, options, reads=False)  # alone it fits, and is read once


def test_adapters_are_merged_by_their_factors_once(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", random_tensors(0, ADAPTED, scale=0.05))
    matrices = {name: shape for name, shape in ADAPTED.items() if "proj" in name}
    tuned = [write_adapter(tmp_path / f"a{t}", random_factors(t + 1, matrices), base) for t in range(2)]
    for name in ("tsv_m", "knots"):
        settings = settings_of((base, tuned, []), name, grid(scale=(0.5, 1.2)), tmp_path / f"many-{name}")
        check_same(settings, tmp_path / name)


def test_adapters_that_a_sweep_would_merge_as_whole_matrices_are_refused(tmp_path: Path) -> None:
    """Whether the factors are merged depends on the memory, and a sweep has less of it than a merge alone."""
    shape = {"model.layers.0.mlp.up_proj.weight": (2048, 2560)}
    base = write_model(tmp_path / "base", random_tensors(0, shape, torch.bfloat16, 0.05))
    tuned = [write_adapter(tmp_path / f"a{t}", random_factors(t + 1, shape), base) for t in range(2)]
    settings = settings_of((base, tuned, []), "task_arithmetic", grid(weight=(0.5, 0.7)), tmp_path / "many")
    with pytest.raises(RecipeError, match="a sweep of these models needs 1[01].* MB"):
        merge_many(settings, Options(memory=100_000_000, threads=1, progress=False))
    check_same(settings, tmp_path, Options(memory=120_000_000, threads=1, progress=False), reads=False)


def test_slices(tmp_path: Path) -> None:
    base, tuned = family(tmp_path, 2)
    for folder in (base, *tuned):
        (folder / "config.json").write_text(json.dumps({"model_type": "test", "num_hidden_layers": 2}))
    sources = [{"model": str(path), "layer_range": [0, 2], "parameters": {"weight": 0.5}} for path in tuned]
    settings = []
    for density in (0.3, 0.6):
        raw = {"base_model": str(base), "merge_method": "ties", "parameters": {"density": density}}
        recipe = Recipe.from_dict(raw | {"slices": [{"sources": sources}]})
        settings.append(Setting(label=str(density), recipe=recipe, unscaled=None, out=tmp_path / "many" / str(density)))
    check_same(settings, tmp_path)


@pytest.mark.parametrize("name", ["regmean", "regmean_plusplus"])
def test_models_that_run_over_their_samples(name: str, tmp_path: Path) -> None:
    """They run once for all settings, unless they run behind what differs."""
    base, tuned = children(tmp_path, "llama")
    keys = {"data": [batch_for("llama", t) for t in range(2)]}
    values = grid(alpha=(0.3, 0.9), scale=(0.5, 1.2))
    settings = settings_of((base, tuned, []), name, values, tmp_path / "many", **keys)
    check_same(settings, tmp_path, passes=1 if name == "regmean" else 4, reads=False)


def test_what_differs_in_what_is_read_takes_a_pass_of_its_own(models: Any, tmp_path: Path) -> None:
    """A file beside the weights is made from the models again."""
    settings = settings_of(models, "emr", [{}], tmp_path / "many")
    assert "masks" in why_apart(settings[0].recipe)
    assert [one.outputs for one in merge_many(settings, SMALL)] == [1]
    assert (settings[0].out / "emr_masks.safetensors").exists()


@pytest.mark.parametrize("segments", [1, 9, 25])
def test_an_interrupted_pass_is_continued(segments: int, models: Any, tmp_path: Path) -> None:
    """By the same call; by a merge of one setting alone, too."""
    values = grid(density=(0.1, 0.4), scale=(0.5, 1.2))
    settings = settings_of(models, "ties", values, tmp_path / "many", scope="global")
    with interrupted_writing(segments):
        merge_many(settings, SMALL)
    assert len(list((tmp_path / "many").glob("*.partial"))) == 4
    merge_to_disk(settings[1].recipe, settings[1].out, SMALL)
    alone = read_model(settings[1].out)
    check_same([settings[0], *settings[2:]], tmp_path, reads=False)
    assert same(alone, read_model(merged(settings[1].recipe, tmp_path / "anew")))
    assert not list((tmp_path / "many").glob("*.partial"))


@contextmanager
def interrupted_writing(segments: int) -> Iterator[None]:
    written, count = SeveralExecutor.write, []

    def fail_later(self: SeveralExecutor, segment: Any) -> None:
        if len(count) == segments:
            raise KeyboardInterrupt
        written(self, segment)
        count.append(segment)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SeveralExecutor, "write", fail_later)
        yield


def merged(recipe: Recipe, out: Path) -> Path:
    merge_to_disk(recipe, out, SMALL)
    return out


def test_an_overflow_says_of_which_setting_and_leaves_nothing(tmp_path: Path) -> None:
    base, tuned = family(tmp_path, 2, {"w": (3, 4)}, torch.float16)
    settings = settings_of((base, tuned, []), "task_arithmetic", grid(scale=(1.0, 1e7)), tmp_path / "many")
    with pytest.raises(Overflow, match=r"^scale=10000000.0: w: "):
        merge_many(settings, SMALL)
    assert not list((tmp_path / "many").iterdir())


def test_nan_in_an_input_fails_as_in_a_merge(tmp_path: Path) -> None:
    base, tuned = family(tmp_path, 2, {"w": (3, 4)})
    write_model(tuned[1], {"w": torch.full((3, 4), float("nan"))})
    settings = settings_of((base, tuned, []), "ties", grid(density=(0.1, 0.4)), tmp_path / "many", scope="global")
    with pytest.raises(NonFinite, match="tuned1: 12 of 12 entries"):
        merge_many(settings, SMALL)
    assert not list((tmp_path / "many").iterdir())


def test_too_little_memory_is_said_before_anything_is_read(models: Any, tmp_path: Path) -> None:
    settings = settings_of(models, "ties", grid(density=(0.1, 0.4)), tmp_path / "many")
    with pytest.raises(RecipeError, match="a sweep of these models needs"):
        merge_many(settings, replace(SMALL, memory=SLACK + (17 << 20)))
    assert not list((tmp_path / "many").iterdir())
