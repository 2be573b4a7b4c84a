"""Adapter folders read as models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from pymerge.checkpoint import open_checkpoint
from pymerge.checkpoint.lora import open_adapter
from pymerge.errors import InputError, MergeError, ShapeMismatch
from tests.adapters import SHAPES, TARGETS, adapted, random_factors, write_adapter
from tests.models import random_tensors, read_model, write_model

MATRICES = {f"{module}.weight": SHAPES[f"{module}.weight"] for module in TARGETS}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", random_tensors(0, SHAPES, torch.bfloat16))


def test_every_weight_is_base_plus_scaled_product_not_rounded(base: Path, tmp_path: Path) -> None:
    factors = random_factors(1, MATRICES)
    expected = adapted(read_model(base), factors, scale=6 / 4)
    with open_checkpoint(write_adapter(tmp_path / "a", factors, base, lora_alpha=6)) as model:
        assert list(model) == list(open_checkpoint(base))
        for name, tensor in model.items():
            found = tensor.load()
            assert found.dtype == (torch.float32 if name in MATRICES else torch.bfloat16)
            torch.testing.assert_close(found.double(), expected[name], rtol=0, atol=1e-6)


def test_bits_do_not_depend_on_what_is_asked_for(base: Path, tmp_path: Path) -> None:
    with open_checkpoint(write_adapter(tmp_path / "a", random_factors(1, MATRICES), base)) as model:
        tensor = model["model.layers.0.mlp.up_proj.weight"]
        whole = tensor.load().reshape(-1)
        for first, count in ((0, 7), (23, 50), (1300, 44), (5, 0)):
            raw = bytearray(4 * count)
            tensor.read_into(memoryview(raw), 4 * first)
            part = torch.frombuffer(raw, dtype=torch.float32) if count else torch.empty(0)
            assert torch.equal(part, whole[first : first + count])


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 16}, 4.0),
        ({"lora_alpha": 16, "use_rslora": True}, 8.0),
        ({"lora_alpha": 1, "alpha_pattern": {"layers.0.mlp.up_proj": 2, "mlp.up_proj": 40}}, 0.5),
        ({"r": 64, "lora_alpha": 4, "rank_pattern": {".*_proj": 4}}, 1.0),
        ({"lora_alpha": 4, "alpha_pattern": {"p_proj": 40}}, 1.0),
    ],
)
def test_scales(config: dict[str, Any], scale: float, base: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    factors = random_factors(1, {name: SHAPES[name]})
    with open_checkpoint(write_adapter(tmp_path / "a", factors, base, **config)) as model:
        expected = adapted(read_model(base), factors, scale)[name]
        torch.testing.assert_close(model[name].load().double(), expected, rtol=0, atol=2e-6)


def test_saved_modules_replace_the_base_and_embeddings_are_transposed(base: Path, tmp_path: Path) -> None:
    head, a, b = torch.randn(40, 24), torch.randn(4, 40), torch.randn(24, 4)
    tensors = {"lm_head.weight": head, "model.layers.0.norm.modules_to_save.weight": torch.ones(24)}
    tensors |= {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    with open_checkpoint(write_adapter(tmp_path / "a", tensors, base)) as model:
        assert torch.equal(model["lm_head.weight"].load(), head)
        assert torch.equal(model["model.layers.0.norm.weight"].load(), torch.ones(24))
        expected = read_model(base)["model.embed_tokens.weight"].float() + (b @ a).T
        torch.testing.assert_close(model["model.embed_tokens.weight"].load(), expected, rtol=1e-5, atol=1e-5)


def test_conv1d(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"h.0.c_attn.weight": torch.randn(24, 72), "h.0.c_attn.bias": torch.ones(72)})
    a, b = torch.randn(4, 24), torch.randn(72, 4)
    factors = {"transformer.h.0.c_attn.lora_A.weight": a, "transformer.h.0.c_attn.lora_B.weight": b}
    with open_checkpoint(write_adapter(tmp_path / "a", factors, base, fan_in_fan_out=True)) as model:
        expected = read_model(base)["h.0.c_attn.weight"] + (b @ a).T
        torch.testing.assert_close(model["h.0.c_attn.weight"].load(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ShapeMismatch, match="fan_in_fan_out"):
        open_checkpoint(write_adapter(tmp_path / "b", factors, base))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "changed the base"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "fused experts"),
        ({"layer_replication": [[0, 4]]}, "layers are repeated"),
        ({"r": 8}, "factors of rank 4, the config says 8"),
        ({"lora_alpha": "x"}, "must be a number"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern"),
    ],
)
def test_other_adapters_are_refused(config: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", random_factors(1, MATRICES), base, **config)
    with pytest.raises(MergeError, match=re.escape(message)):
        open_checkpoint(folder)


def test_tensors_that_do_not_belong(base: Path, tmp_path: Path) -> None:
    factors = random_factors(1, MATRICES)
    module = TARGETS[0]
    cases = {
        "magnitude": factors | {f"{module}.lora_magnitude_vector": torch.ones(24)},
        "half a pair": {key: t for key, t in factors.items() if key != f"{module}.lora_B.weight"},
        "lora_A": factors | {f"{module}.lora_A.weight": torch.ones(4, 24, 3, 3)},
        "base model lacks": {key.replace("layers.0", "layers.7"): t for key, t in factors.items()},
    }
    for i, (message, tensors) in enumerate(cases.items()):
        with pytest.raises(InputError, match=message):
            open_checkpoint(write_adapter(tmp_path / f"a{i}", tensors, base))


def test_base_must_be_known(base: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", random_factors(1, MATRICES), "org/model")
    with pytest.raises(InputError, match=r"'org/model'.*give the base"):
        open_checkpoint(folder)
    with open_checkpoint(base) as opened, open_adapter(folder, opened) as model:
        assert len(model) == len(SHAPES)


@pytest.mark.parametrize("method", ["ties", "linear", "task_arithmetic", "tsv_m", "dare_linear"])
def test_recipes_merge_adapters_like_the_whole_models_they_mean(method: str, tmp_path: Path) -> None:
    whole = random_tensors(0, SHAPES)
    base = write_model(tmp_path / "base", whole)
    folders, models = [], []
    for t in range(2):
        factors = random_factors(t + 1, MATRICES)
        folders.append(write_adapter(tmp_path / f"adapter{t}", factors, base))
        models.append(write_model(tmp_path / f"model{t}", adapted(whole, factors, dtype=torch.float32)))
    given = None if method == "linear" else base
    options = pymerge.Options(progress=False)
    pymerge.merge(given, models, method=method, out=tmp_path / "expected", options=options)
    pymerge.merge(given, folders, method=method, out=tmp_path / "alone", options=options)
    pymerge.merge(given, [f"{base}+{f}" for f in folders], method=method, out=tmp_path / "named", options=options)
    expected, alone, named = (read_model(tmp_path / name) for name in ("expected", "alone", "named"))
    for name, tensor in expected.items():
        torch.testing.assert_close(alone[name], tensor, rtol=1e-5, atol=1e-5)
        assert torch.equal(alone[name], named[name])
    assert (tmp_path / "alone" / "config.json").exists()


def test_dtypes_of_the_output_are_those_of_the_base(base: Path, tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / f"a{t}", random_factors(t, MATRICES), base) for t in range(2)]
    pymerge.merge(None, folders, method="linear", out=tmp_path / "out")
    assert {t.dtype for t in read_model(tmp_path / "out").values()} == {torch.bfloat16}


def test_mergekit_spellings(base: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", random_factors(1, MATRICES))
    mapping = {"model": {"path": str(base)}, "lora": {"path": str(folder)}}
    outs = []
    for i, model in enumerate((mapping, f"{base}+{folder}", str(folder))):
        entry = {"model": model, "parameters": {"weight": 1.0}}
        raw = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [entry]}
        outs.append(tmp_path / f"out{i}")
        pymerge.Recipe.from_dict(raw).run(outs[-1])
    first, *others = (read_model(out) for out in outs)
    assert all(torch.equal(first[n], other[n]) for other in others for n in first)


def test_a_changed_config_is_another_input(base: Path, tmp_path: Path) -> None:
    factors = random_factors(1, MATRICES)
    prints = []
    for alpha in (4, 8):
        with open_checkpoint(write_adapter(tmp_path / "a", factors, base, lora_alpha=alpha)) as model:
            prints.append(model.fingerprint()["adapter_config"])
    assert prints[0] != prints[1]
