"""Folders of several components, written by hand: a small pipeline and a small sentence encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models import random_tensors, tuned_from

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "unet": {
        "conv_in.weight": (8, 4, 3, 3),
        "down_blocks.0.to_q.weight": (16, 8),
        "down_blocks.1.to_q.weight": (16, 8),
    },
    "text_encoder": {"text_model.embeddings.weight": (20, 8), "text_model.layers.0.fc.weight": (8, 16)},
    "vae": {"decoder.conv.weight": (3, 8, 1, 1), "decoder.conv.bias": (3,)},
}
INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
DIFFUSERS = "diffusion_pytorch_model.safetensors"
FILES = {"unet": DIFFUSERS, "vae": DIFFUSERS, "text_encoder": "model.safetensors"}
Model = dict[str, dict[str, Tensor]]


def random_model(seed: int, shapes: Mapping[str, Mapping[str, tuple[int, ...]]] = SHAPES) -> Model:
    return {name: random_tensors(seed + i, own) for i, (name, own) in enumerate(shapes.items())}


def tuned_model(base: Model, seed: int) -> Model:
    return {name: tuned_from(own, seed + i) for i, (name, own) in enumerate(base.items())}


def write_json(path: Path, table: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table))


def write_pipeline(folder: Path, model: Model, index: Mapping[str, Any] = INDEX) -> Path:
    """A folder as diffusers saves a pipeline."""
    write_json(folder / "model_index.json", index)
    write_json(folder / "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"})
    write_json(folder / "tokenizer/tokenizer_config.json", {})
    write_json(folder / "tokenizer/vocab.json", {"a": 0})
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    write_json(folder / "text_encoder/config.json", {"model_type": "clip_text_model", "torch_dtype": "float32"})
    for name, tensors in model.items():
        if name != "text_encoder":
            write_json(folder / name / "config.json", {"_class_name": index[name][1]})
        save_file(tensors, folder / name / FILES[name], metadata={"format": "pt"})
    return folder


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
]
ENCODER = {
    "": {"encoder.layer.0.fc.weight": (16, 8), "embeddings.weight": (20, 8)},
    "2_Dense": {"linear.weight": (4, 8), "linear.bias": (4,)},
}


def write_encoder(folder: Path, model: Model) -> Path:
    """A folder as sentence-transformers saves an encoder with a dense layer behind it."""
    write_json(folder / "modules.json", MODULES)
    write_json(folder / "config.json", {"model_type": "bert", "torch_dtype": "float32"})
    write_json(folder / "config_sentence_transformers.json", {})
    write_json(folder / "1_Pooling/config.json", {"pooling_mode_mean_tokens": True})
    write_json(folder / "2_Dense/config.json", {"in_features": 8, "out_features": 4})
    for name, tensors in model.items():
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


def flat(model: Model) -> dict[str, Tensor]:
    """The tensors by the names that a recipe knows them by."""
    return {f"{name}/{key}" if name else key: t for name, own in model.items() for key, t in own.items()}


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
