"""README, "Coming from PEFT": which merge equals which `combination_type` of PEFT's add_weighted_adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import pymerge

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

RANK = {"math": 4, "code": 2}
FULL = 32  # no update has a higher rank
Folders = dict[str, str]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A small base and two adapters of other ranks and scales on it."""
    folder = tmp_path_factory.mktemp("peft")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    for name, rank in RANK.items():
        base = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
        lora = peft.LoraConfig(r=rank, lora_alpha=3 * rank + 1, target_modules=["q_proj", "down_proj"])
        model = peft.get_peft_model(base, lora)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.copy_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("base", *RANK)}


def theirs(folders: Folders, weights: list[float], **arguments: Any) -> dict[str, Tensor]:
    """The update of each matrix as PEFT merges it."""
    base = transformers.LlamaForCausalLM.from_pretrained(folders["base"])
    model = peft.PeftModel.from_pretrained(base, folders["math"], adapter_name="math")
    model.load_adapter(folders["code"], adapter_name="code")
    model.add_weighted_adapter(["math", "code"], weights, "both", **arguments)
    modules = {name: m for name, m in model.base_model.model.named_modules() if "both" in getattr(m, "lora_A", {})}
    return {name: module.get_delta_weight("both").detach() for name, module in modules.items()}


def ours(folders: Folders, out: Path, as_adapter: int | bool, **arguments: Any) -> dict[str, Tensor]:
    pymerge.merge(folders["base"], [folders["math"], folders["code"]], **arguments, as_adapter=as_adapter, out=out)
    config, factors = (
        json.loads((out / "adapter_config.json").read_text()),
        load_file(out / "adapter_model.safetensors"),
    )
    assert config["lora_alpha"] == config["r"]  # the scale is 1
    updates = {}
    for key, a in factors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            updates[module.removeprefix("base_model.model.")] = factors[f"{module}.lora_B.weight"] @ a
    return updates


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys() and len(got) == 4
    for name, update in expected.items():
        assert (got[name] - update).norm() <= 1e-5 * update.norm(), name


TRIM = {"purify": {"method": "trim", "density": 0.3}}
TIES = {"method": "ties", "density": 1, "scope": "tensor"}  # behind trim, which keeps exactly as many entries
DARE_TIES = {"method": "dare_ties", "density": 1, "trim": 1, "merge_func": "mean", "scope": "tensor"}


@pytest.mark.parametrize(
    ("theirs_given", "weights", "ours_given", "as_adapter"),
    [
        ({"combination_type": "cat"}, [0.7, -0.4], {"method": "task_arithmetic"}, True),
        ({"combination_type": "svd", "svd_rank": 3}, [0.7, -0.4], {"method": "task_arithmetic"}, 3),
        ({"combination_type": "svd"}, [0.7, 0.4], {"method": "task_arithmetic"}, max(RANK.values())),
        (
            {"combination_type": "magnitude_prune_svd", "density": 0.3, "svd_rank": FULL},
            [0.7, 0.4],
            {"method": "task_arithmetic", **TRIM},
            FULL,
        ),
        ({"combination_type": "ties_svd", "density": 0.3, "svd_rank": FULL}, [0.7, 0.7], TIES | TRIM, FULL),
        ({"combination_type": "ties_svd", "density": 0.3, "svd_rank": 5}, [1.0, 1.0], TIES | TRIM, 5),
        ({"combination_type": "dare_ties_svd", "density": 1, "svd_rank": FULL}, [0.7, 0.7], DARE_TIES, FULL),
    ],
    ids=["cat", "svd", "svd-default-rank", "magnitude_prune_svd", "ties_svd", "ties_svd-truncated", "dare_ties_svd"],
)
def test_equals_add_weighted_adapter(folders, tmp_path, theirs_given, weights, ours_given, as_adapter):
    expected = theirs(folders, weights, **theirs_given)
    assert_close(ours(folders, tmp_path / "out", as_adapter, weight=weights, scale=1.0, **ours_given), expected)


def test_merge_and_unload(folders, tmp_path):
    base = transformers.LlamaForCausalLM.from_pretrained(folders["base"])
    expected = peft.PeftModel.from_pretrained(base, folders["math"]).merge_and_unload().state_dict()
    pymerge.merge(folders["base"], [folders["math"]], method="task_arithmetic", scale=1.0, out=tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-7)


def test_random_entries_are_kept_and_rescaled_alike(folders, tmp_path):
    """Other random numbers: equal shares of zeros, and equal factors of what is left."""
    given = {"combination_type": "dare_linear_svd", "density": 0.5, "svd_rank": FULL}
    expected = theirs(folders, [1.0, 0.0], **given)
    options = {"density": 0.5, "weight": [1.0, 0.0], "scale": 1.0}
    found = ours(folders, tmp_path / "out", FULL, method="dare_linear", **options)
    for name, update in theirs(folders, [1.0, 0.0], combination_type="cat").items():
        for merged in (found[name], expected[name]):
            ratio = merged / update
            kept = ratio.abs() > 0.1
            assert abs(kept.float().mean() - 0.5) < 0.08
            assert ((ratio[kept] - 2).abs() < 0.01).float().mean() > 0.99


def test_kinds_that_sum_factors_are_another_merge(folders, tmp_path):
    """linear, ties, ... without svd merge A and B apart: the product has terms of one adapter's B and another's A."""
    same_rank = {**folders, "code": folders["math"]}
    expected = theirs(same_rank, [0.5, 0.5], combination_type="linear")
    found = ours(folders, tmp_path / "out", True, method="task_arithmetic", weight=[0.5, 0.5], scale=1.0)
    assert all((found[name] - expected[name]).norm() > 0.1 * expected[name].norm() for name in expected)
