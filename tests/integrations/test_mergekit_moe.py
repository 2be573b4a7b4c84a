"""Mixtures of experts against mergekit 0.1.5 itself (`make test-mergekit`), which writes one tensor for all experts."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

import pymerge
from pymerge.checkpoint import open_checkpoint
from pymerge.checkpoint.expert_layouts import Mapper
from tests.mixtures import made, save_both

if find_spec("mergekit") is None:
    pytest.skip("mergekit is not installed: make test-mergekit", allow_module_level=True)

PATHS = ("base", "one", "two")
RECIPES = {
    "task_arithmetic": {"merge_method": "task_arithmetic"},
    "linear": {"merge_method": "linear"},
    "slerp": {"merge_method": "slerp", "parameters": {"t": 0.3}},
    "ties": {"merge_method": "ties", "parameters": {"density": 0.5}},
}


@pytest.fixture(scope="module", params=["MixtralConfig", "Qwen3MoeConfig"])
def places(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        path: save_both(unrounded(made(request.param, seed), seed), folder / path) for seed, path in enumerate(PATHS)
    }


def unrounded(model, seed):
    """float32 values no two of which are equal: mergekit's selection is not stable where magnitudes tie."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.float().parameters():
            parameter += 1e-3 * torch.randn(parameter.shape, generator=generator)
    return model


def recipe_of(places, layouts, method):
    folders = [str(places[path][layout]) for path, layout in zip(PATHS, layouts, strict=True)]
    if method == "slerp":
        return RECIPES[method] | {"base_model": folders[0], "models": [{"model": f} for f in folders[:2]]}
    weights = (0.2, 0.5, 0.3) if method == "linear" else (0.4, 0.3)
    models = [{"model": f, "parameters": {"weight": w}} for f, w in zip(folders[-len(weights) :], weights, strict=True)]
    return RECIPES[method] | ({} if method == "linear" else {"base_model": folders[0]}) | {"models": models}


@pytest.mark.parametrize("layouts", [("each", "each", "each"), ("fused", "fused", "fused"), ("fused", "each", "each")])
@pytest.mark.parametrize("method", RECIPES)
def test_values_agree(places, method, layouts, tmp_path):
    """mergekit looks at fused tensors whatever the models are; pymerge at tensors as the base stores them. So methods
    that look at whole tensors give the same experts where the base's are fused."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = recipe_of(places, layouts, method) | {"dtype": "float32"}
    theirs = recipe_of(places, layouts[1:2] * 3, method)
    parsed = MergeConfiguration.model_validate(theirs | {"dtype": "float32"})
    run_merge(parsed, str(tmp_path / "theirs"), MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))
    pymerge.Recipe.from_dict(config).run(tmp_path / "ours")
    whole = method in ("slerp", "ties") and layouts[0] == "each"
    with open_checkpoint(tmp_path / "theirs") as reference, open_checkpoint(tmp_path / "ours") as ours:
        view = Mapper(reference, ours, "ours").run()
        assert set(view) == set(reference)
        for name in reference:
            if not (whole and ".experts." in name):
                torch.testing.assert_close(view[name].load(), reference[name].load(), rtol=1e-5, atol=1e-6, msg=name)
