"""RegMean++: layers are observed behind the merged layers before them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pymerge
from pymerge.methods.regmean import RegMean
from tests.methods.moments import group_of

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
