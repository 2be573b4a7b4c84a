"""RegMean++: layers are observed behind the merged layers before them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pymerge
from pymerge.engine.scaled import why_merged_anew
from pymerge.errors import InputError, RecipeError
from pymerge.methods.regmean import RegMean
from tests.methods.moments import group_of
from tests.models import interrupted_after, read_model, same

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.engine.live_models import batch_for, children, loaded  # noqa: E402

LAYERS = {"llama": "model.layers", "bert": "bert.encoder.layer", "vit": "vit.layers", "gpt2": "transformer.h"}
BEHIND = {"bert": ["bert.pooler.dense"]}  # linear layers outside of all blocks that are merged, in order


def inputs_of(model: nn.Module, names: Sequence[str], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows that linear layers are given, padding left out."""
    seen: dict[str, Tensor] = {}
    mask = batch.get("attention_mask")

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            x = args[0]
            fits = mask is not None and x.shape[:2] == mask.shape
            seen[name] = x[mask.bool()] if fits and mask is not None else x.reshape(-1, x.shape[-1])

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    with torch.inference_mode():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def reference(kind: str, base: Path, tuned: Sequence[Path], batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Each layer in a copy of the model merged so far, in whose place the task's own layer is put."""
    models, merged, start = [loaded(path) for path in tuned], loaded(base), loaded(base)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.copy_(torch.stack([model.get_parameter(name) for model in models]).mean(0))
    stages = [f"{LAYERS[kind]}.{i}" for i in range(len(merged.get_submodule(LAYERS[kind])))] + BEHIND.get(kind, [])
    for stage in stages:
        inner = [
            n for n, m in merged.get_submodule(stage).named_modules() if m.__class__.__name__ in ("Linear", "Conv1D")
        ]
        linear = [f"{stage}.{n}" if n else stage for n in inner]
        rows: dict[str, list[Tensor]] = {name: [] for name in linear}
        for model, batch in zip(models, batches, strict=True):
            candidate = copy.deepcopy(merged)
            candidate.get_submodule(stage).load_state_dict(model.get_submodule(stage).state_dict())
            for name, x in inputs_of(candidate, linear, batch).items():
                rows[name].append(x)
        with torch.no_grad():
            for name in linear:
                flip = type(merged.get_submodule(name)).__name__ == "Conv1D"
                w0, *ws = (m.get_parameter(f"{name}.weight").detach() for m in (start, *models))
                w0, ws = (w0.mT, [w.mT for w in ws]) if flip else (w0, ws)
                update = RegMean().combine(group_of(w0, ws, rows[name]))
                merged.get_parameter(f"{name}.weight").copy_((w0 + update).mT if flip else w0 + update)
    return {name: tensor.detach() for name, tensor in merged.state_dict().items()}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_same_as_putting_layers_into_the_merged_model(tmp_path: Path, kind: str) -> None:
    base, tuned = children(tmp_path, kind)
    batches = [batch_for(kind, task) for task in range(2)]
    pymerge.merge(base, tuned, method="regmean_plusplus", data=batches, out=tmp_path / "out")
    truth, found = reference(kind, base, tuned, batches), loaded(tmp_path / "out").state_dict()
    pymerge.merge(base, tuned, method="regmean", data=batches, out=tmp_path / "plain")
    plain = loaded(tmp_path / "plain").state_dict()
    moved = 0.0
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, truth[name], rtol=1e-4, atol=1e-5, msg=name)
        moved = max(moved, float((plain[name] - tensor).abs().max()))
    assert moved > 1e-4  # RegMean is something else


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, list[Path], list[dict[str, Tensor]]]:
    return *children(tmp_path, "llama"), [batch_for("llama", task) for task in range(2)]


@pytest.mark.parametrize("segments", [3, 12, 17])
def test_an_interrupted_merge_continues_to_the_same_bytes(llama: Any, tmp_path: Path, segments: int) -> None:
    base, tuned, batches = llama
    join = [["*.q_proj.weight", "*.k_proj.weight", "*.v_proj.weight"]]
    options: dict[str, Any] = {"method": "regmean_plusplus", "data": batches, "join": join, "dtype": "bfloat16"}
    pymerge.merge(base, tuned, **options, out=tmp_path / "whole")
    with interrupted_after(segments):
        pymerge.merge(base, tuned, **options, out=tmp_path / "out")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("observe ")]
    pymerge.merge(base, tuned, **options, out=tmp_path / "out")
    assert same(read_model(tmp_path / "out"), read_model(tmp_path / "whole"))


def test_layers_that_are_excluded_are_the_base_in_what_follows(llama: Any, tmp_path: Path) -> None:
    base, tuned, batches = llama
    first = ["model.layers.0.*"]
    pymerge.merge(base, tuned, method="regmean_plusplus", data=batches, exclude=first, out=tmp_path / "out")
    found = loaded(tmp_path / "out")
    assert same(found.model.layers[0].state_dict(), loaded(base).model.layers[0].state_dict())
    rows, name = [], "model.layers.1.self_attn.o_proj"
    for path, batch in zip(tuned, batches, strict=True):
        candidate = copy.deepcopy(found)
        candidate.model.layers[1].load_state_dict(loaded(path).model.layers[1].state_dict())
        rows.append(inputs_of(candidate, [name], batch)[name])
    w0, *ws = (loaded(path).get_parameter(f"{name}.weight").detach() for path in (base, *tuned))
    update = RegMean().combine(group_of(w0, ws, rows))
    torch.testing.assert_close(found.get_parameter(f"{name}.weight").detach(), w0 + update, rtol=1e-5, atol=1e-6)


def test_what_is_refused(llama: Any, tmp_path: Path) -> None:
    base, tuned, batches = llama
    found = [pymerge.observe(path, [batch]) for path, batch in zip(tuned, batches, strict=True)]
    with pytest.raises(RecipeError, match="observes the models while they are merged: data, no statistics"):
        pymerge.Recipe.from_kwargs(base, tuned, "regmean_plusplus", statistics=found)
    with pytest.raises(RecipeError, match="regmean_plusplus needs `data: FILE` beside .*task0: samples of its task"):
        pymerge.Recipe.from_kwargs(base, tuned, "regmean_plusplus")
    with pytest.raises(RecipeError, match="pave and regmean_plusplus take different inputs"):
        pymerge.Recipe.from_kwargs(base, tuned, "regmean_plusplus", data=batches, purify="pave")


def test_a_search_over_the_scale_merges_anew(llama: Any) -> None:
    base, tuned, batches = llama
    found = pymerge.Recipe.from_kwargs(base, tuned, "regmean_plusplus", data=batches)
    assert "observes layers behind those that are merged at that scale" in why_merged_anew(found)


def test_blocks_that_run_twice_are_refused(tmp_path: Path) -> None:
    base, tuned = children(tmp_path, "albert")
    with pytest.raises(InputError, match="albert_layer_groups.0 runs more than once in a pass"):
        data = [batch_for("albert", task) for task in range(2)]
        pymerge.merge(base, tuned, method="regmean_plusplus", data=data, out=tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
