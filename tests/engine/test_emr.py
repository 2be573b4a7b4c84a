"""EMR: the masks and scales beside the merged model, and the task models that they give back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import pymerge
from pymerge.engine import masks
from pymerge.errors import InputError, Interrupted, RecipeError
from pymerge.runtime import emr
from tests.methods.test_emr import emr_truth
from tests.models import family, read_model, same

SHAPES = {"model.embed_tokens.weight": (300, 111), "layers.0.w": (64, 63), "layers.0.b": (5,), "scalar": (), "no": (0,)}


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def truth(base, models) -> tuple[dict, dict, list[float]]:
    """E and masks by tensor, and the scales, from the formula."""
    names = [name for name in base if base[name].numel()]
    parts = {name: emr_truth([m[name].float() - base[name].float() for m in models]) for name in names}
    scales = []
    for t, model in enumerate(models):
        size = sum((model[n].double() - base[n].double()).abs().mean() for n in names)
        scales.append(float(size / sum((parts[n][0] * parts[n][1][t]).abs().mean() for n in names)))
    return {n: e for n, (e, _) in parts.items()}, {n: m for n, (_, m) in parts.items()}, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_task_models_are_the_formula(tmp_path: Path, dtype: torch.dtype) -> None:
    base, models = family(tmp_path, 3, SHAPES, dtype)
    out = tmp_path / "out"
    summary = pymerge.merge(base, models, method="emr", out=out)
    w0, tuned = read_model(base), [read_model(m) for m in models]
    elected, chosen, scales = truth(w0, tuned)
    assert "emr_masks.safetensors" in summary["side_files"] and pymerge.verify(out)["tensors"] == len(SHAPES)
    tolerance = {"rtol": 0, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-8}
    merged = read_weights(out)
    for t, label in enumerate(map(str, models)):
        model = emr.load(out, base, t)
        assert list(model) == list(merged) and same(model, emr.load(out, w0, label))
        for name, e in elected.items():
            torch.testing.assert_close(merged[name].double(), w0[name].double() + e, **tolerance)
            expected = w0[name].double() + scales[t] * chosen[name][t] * e
            assert model[name].dtype == dtype
            torch.testing.assert_close(model[name].double(), expected, **tolerance)


def test_tensors_that_are_not_merged_have_no_mask(tmp_path: Path) -> None:
    base, models = family(tmp_path, 2, SHAPES)
    pymerge.merge(base, models, method="emr", out=tmp_path / "out", exclude=["layers.0.b"])
    with safe_open(tmp_path / "out" / "emr_masks.safetensors", "pt") as file:
        assert "layers.0.b" not in file.keys() and json.loads(file.metadata()["tasks"]) == list(map(str, models))
    assert torch.equal(emr.load(tmp_path / "out", base, 1)["layers.0.b"], read_model(base)["layers.0.b"])


def test_a_zero_task_has_nothing_to_use(tmp_path: Path) -> None:
    base, models = family(tmp_path, 1, SHAPES)
    twin = tmp_path / "twin"
    twin.mkdir()
    for file in base.iterdir():
        (twin / file.name).write_bytes(file.read_bytes())
    pymerge.merge(base, [*models, twin], method="emr", out=tmp_path / "out")
    assert same(emr.load(tmp_path / "out", base, 1), read_model(base))
    for name, tensor in emr.load(tmp_path / "out", base, 0).items():
        torch.testing.assert_close(tensor, read_model(models[0])[name], rtol=1e-5, atol=1e-6)


def test_masks_follow_the_purify_step_and_the_chunks_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, models = family(tmp_path, 3, SHAPES)
    for i, purify in enumerate([None, "trim"]):
        pymerge.merge(base, models, method="emr", purify=purify, out=tmp_path / f"a{i}")
        monkeypatch.setattr(masks, "CHUNK", 1 << 14)
        pymerge.merge(base, models, method="emr", purify=purify, out=tmp_path / f"b{i}")
        written = [(tmp_path / f"{x}{i}" / "emr_masks.safetensors").read_bytes() for x in "ab"]
        assert written[0] == written[1]
    trimmed, whole = (emr.load(tmp_path / f"a{i}", base, 0)["layers.0.w"] for i in (1, 0))
    w0 = read_model(base)["layers.0.w"]
    assert (trimmed != w0).sum() < (whole != w0).sum()


def test_an_interrupted_merge_writes_the_same_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = family(tmp_path, 2, SHAPES)
    pymerge.merge(base, models, method="emr", out=tmp_path / "whole")
    write = masks.write_item

    def fail(file, plan, item, steps):
        if item.entry.name == "layers.0.w":
            raise KeyboardInterrupt
        return write(file, plan, item, steps)

    monkeypatch.setattr(masks, "write_item", fail)
    with pytest.raises(Interrupted, match="the merged weights are kept"):
        pymerge.merge(base, models, method="emr", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(masks, "write_item", write)
    pymerge.merge(base, models, method="emr", out=tmp_path / "out")
    assert same(read_model(tmp_path / "out"), read_model(tmp_path / "whole"))


def test_what_cannot_be(tmp_path: Path) -> None:
    base, models = family(tmp_path, 2, SHAPES)
    with pytest.raises(RecipeError, match="emr leaves masks beside the merged model"):
        pymerge.merge(read_model(base), [read_model(m) for m in models], method="emr")
    pymerge.merge(base, models, method="emr", out=tmp_path / "out")
    with pytest.raises(InputError, match="no emr_masks.safetensors here"):
        emr.load(base, base, 0)
    with pytest.raises(InputError, match="task 2: the merge had 0: .*, 1: "):
        emr.load(tmp_path / "out", base, 2)
    with pytest.raises(InputError, match="layers.0.b: merged, yet absent from the base"):
        emr.load(tmp_path / "out", {n: t for n, t in read_model(base).items() if n != "layers.0.b"}, 0)
