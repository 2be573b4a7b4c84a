"""A scale applied to an update that was merged once gives the bytes of a merge at that scale, for every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from pymerge import methods
from pymerge.engine.local import merge_to_disk
from pymerge.engine.plan import SLACK, Options
from pymerge.engine.scaled import merge_scaled, merge_update, why_merged_anew
from pymerge.methods.base import Combine
from tests.engine.observed import SHAPES, saved, statistics_of
from tests.models import family, interrupted_after, read_model, same, write_model

TASKS = 3
HAVE_SCALE = [
    name
    for name in methods.list("combine")
    if any(p.name == "scale" and not p.per_model for p in methods.describe(name).parameters)
]
# Experts of one scale; layers that see what those before them are at one scale. Adapters: test_factored.py.
SCALED = [name for name in HAVE_SCALE if name not in ("esmpp", "regmean_plusplus", "knots", "core_space")]
SETTINGS: dict[str, dict[str, Any]] = {"wudi": {"steps": 5}}


def test_methods_without_a_scale_are_merged_anew() -> None:
    assert set(methods.list("combine")) - set(HAVE_SCALE) == {
        "arcee_fusion",
        "emr",
        "fisher",
        "karcher",
        "linear",
        "model_stock",
        "multislerp",
        "nearswap",
        "nuslerp",
        "passthrough",
        "ram",
        "ramplus_tl",
        "sce",
        "slerp",
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], list[Path]]:
    """A family in bfloat16 and its statistics."""
    folder = tmp_path_factory.mktemp("models")
    base, tuned = family(folder, TASKS, SHAPES | {"positions": (4,)}, torch.bfloat16)
    for path in (base, *tuned):
        write_model(path, read_model(path) | {"positions": torch.arange(4)})
    found = [statistics_of(t, path=path) for t, path in enumerate(tuned)]
    return base, tuned, saved(found, folder)


def at(models: tuple[Path, list[Path], list[Path]], name: str, scale: float, **keys: Any) -> pymerge.Recipe:
    base, tuned, statistics = models
    needs = "covariance" in methods.describe(name).needs or keys.get("purify") == "pave"
    beside = {"statistics": statistics} if needs else {}
    return pymerge.Recipe.from_kwargs(base, tuned, name, scale=scale, **SETTINGS.get(name, {}), **beside, **keys)


def check_bytes(models: Any, name: str, tmp_path: Path, options: Options, **keys: Any) -> None:
    merge_update(at(models, name, 1.0, **keys), tmp_path / "update", options)
    for i, scale in enumerate((0.37, -1.3)):
        wanted = merge_to_disk(at(models, name, scale, **keys), tmp_path / f"merged{i}", options)
        found = merge_scaled(at(models, name, scale, **keys), tmp_path / "update", tmp_path / f"scaled{i}", options)
        assert same(read_model(tmp_path / f"scaled{i}"), read_model(tmp_path / f"merged{i}")), scale
        for key in ("checksums", "per_tensor", "recipe", "tensors", "notes", "side_files", "inputs"):
            assert found[key] == wanted[key], key
        for file in ("model.safetensors", "config.json", "README.md"):
            assert (tmp_path / f"scaled{i}" / file).read_bytes() == (tmp_path / f"merged{i}" / file).read_bytes()
    assert not same(read_model(tmp_path / "scaled0"), read_model(tmp_path / "scaled1"))


@pytest.mark.parametrize("name", SCALED)
def test_every_method(name: str, models: Any, tmp_path: Path) -> None:
    cls = methods.get(name)
    assert issubclass(cls, Combine) and not why_merged_anew(at(models, name, 1.0))
    options = Options(threads=2, memory=SLACK + (17 << 20))
    check_bytes(models, name, tmp_path, options, out_dtype="float32")  # narrower ones hide the last bits


KEYS: dict[str, dict[str, Any]] = {
    "stored in bfloat16": {"name": "tsv_m"},
    "purified": {"name": "task_arithmetic", "purify": "pave"},
    "ESM of a vision encoder: other tensors keep factor 1": {"name": "esm", "preset": "vit"},
    "parts and joins": {
        "name": "iso_c",
        "split": {"*.in_proj_weight": 3},
        "join": [["layers.0.q.weight", "layers.0.k.weight"]],
    },
    "excluded": {"name": "ties", "exclude": ["embed*"], "out_dtype": "float32"},
}


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_recipes(keys: dict[str, Any], models: Any, tmp_path: Path) -> None:
    check_bytes(models, tmp_path=tmp_path, options=Options(threads=1), **keys)


def test_a_larger_vocabulary_keeps_its_rows(tmp_path: Path) -> None:
    shapes = {"embed_tokens.weight": (9, 4), "norm.weight": (4,)}
    base, tuned = family(tmp_path, 2, shapes)
    for path in tuned:
        tensors = read_model(path)
        write_model(path, tensors | {"embed_tokens.weight": tensors["embed_tokens.weight"][:7].contiguous()})
    keys = {"relax": {"vocabulary": "base_rows"}}
    check_bytes((base, tuned, []), "task_arithmetic", tmp_path, Options(threads=1), **keys)


def test_what_overflows_is_clamped_alike(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"w": torch.full((3, 4), 6e4)})
    tuned = [write_model(tmp_path / f"tuned{t}", {"w": torch.linspace(5e4, 7.5e4, 12).reshape(3, 4)}) for t in (0, 1)]
    keys: dict[str, Any] = {"out_dtype": "float16", "relax": {"overflow": "clamp"}}
    check_bytes((base, tuned, []), "task_arithmetic", tmp_path, Options(threads=1), **keys)
    for found in (read_model(tmp_path / f"scaled{i}")["w"].float() for i in (0, 1)):
        assert found.max() == torch.finfo(torch.float16).max and bool((found < found.max()).any())


def test_calibrate_steps_and_files_beside_are_merged_anew(models: Any) -> None:
    assert "experts" in why_merged_anew(at(models, "esmpp", 1.0))
    for step in ("svc", "lines"):
        assert step in why_merged_anew(at(models, "task_arithmetic", 1.0, calibrate=step))
    assert why_merged_anew(pymerge.Recipe.from_kwargs(None, models[1], "linear")) == "linear has no scale"


def test_the_update_is_float32_and_has_merged_tensors_only(models: Any, tmp_path: Path) -> None:
    merge_update(at(models, "task_arithmetic", 1.0, exclude=["embed*"]), tmp_path / "update")
    update = read_model(tmp_path / "update")
    assert set(update) == set(SHAPES) - {"embed.weight"} and {t.dtype for t in update.values()} == {torch.float32}
    base, tuned = read_model(models[0]), [read_model(path) for path in models[1]]
    for name, tensor in update.items():
        torch.testing.assert_close(tensor, sum(t[name].float() - base[name].float() for t in tuned))


def test_an_update_of_another_recipe_is_never_finished_as_this_one(models: Any, tmp_path: Path) -> None:
    with interrupted_after(2):
        merge_update(at(models, "task_arithmetic", 1.0), tmp_path / "update")
    with pytest.raises(pymerge.MergeError, match="interrupted merge that is not this one"):
        merge_to_disk(at(models, "task_arithmetic", 1.0), tmp_path / "update")
    merge_update(at(models, "task_arithmetic", 1.0), tmp_path / "update")
    assert json.loads((tmp_path / "update" / "merge.json").read_text())["tensors"]["copied"] == 0
