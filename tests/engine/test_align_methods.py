"""A model that is read in another order merges as the same model stored in that order: the same bytes, any step."""

import pytest
import torch

import pymerge
from pymerge.align.random_permutations import random_permutations
from pymerge.align.specs import spec_for
from tests.models import random_tensors, read_model, same, tuned_from, write_model

WIDTH, HEADS, INNER = 64, 4, 96
CONFIG = {"model_type": "llama", "torch_dtype": "bfloat16", "num_attention_heads": HEADS, "tie_word_embeddings": True}
SHAPES = {"model.embed_tokens.weight": (300, WIDTH), "model.norm.weight": (WIDTH,)} | {
    f"model.layers.0.{name}.weight": shape
    for name, shape in {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (WIDTH // 2, WIDTH),
        "self_attn.v_proj": (WIDTH // 2, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }.items()
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """base, a, b; a and b once more in the order of the base, as the permutations say."""
    folder = tmp_path_factory.mktemp("models")
    base = random_tensors(0, SHAPES, torch.bfloat16, 0.1)
    found = {"base": base, "a": tuned_from(base, 1), "b": tuned_from(base, 2)}
    permutations = random_permutations(spec_for(SHAPES, CONFIG), tuple(found), torch.Generator().manual_seed(0))
    for row, label in enumerate(("base", "a", "b")):
        write_model(folder / label, found[label], CONFIG)
        stored = {name: permutations.aligned(name, tensor, row).contiguous() for name, tensor in found[label].items()}
        write_model(folder / "stored" / label, stored, CONFIG)
    permutations.save(folder / "perms.safetensors")
    return folder


STEPS = {
    "linear": {"method": "linear"},
    "ties": {"method": "ties", "density": 0.3},
    "global ties": {"method": "ties", "density": 0.3, "scope": "global"},
    "dare": {"method": "dare_ties", "density": 0.5, "seed": 1},
    "breadcrumbs": {"method": "breadcrumbs"},
    "karcher": {"method": "karcher"},
    "model stock": {"method": "model_stock"},
    "pcb": {"method": "pcb"},
    "tsv_m and svc": {"method": "tsv_m", "calibrate": "svc"},
    "ace": {"method": "ace"},
    "trim, linear and lines": {"method": "task_arithmetic", "purify": "trim", "calibrate": "lines"},
}


def merged(folder, out, method, **keywords):
    """Of base, a and b in a folder; methods that average all models alike get no base."""
    base, *children = (str(folder / label) for label in ("base", "a", "b"))
    alike = method in ("linear", "karcher")
    pymerge.merge(None if alike else base, [base, *children] if alike else children, method=method, out=out, **keywords)
    return read_model(out)


@pytest.mark.parametrize("steps", STEPS)
def test_every_step_reads_the_permuted_view(models, tmp_path, steps):
    stored = merged(models / "stored", tmp_path / "stored", **STEPS[steps])
    assert same(merged(models, tmp_path / "view", align=str(models / "perms.safetensors"), **STEPS[steps]), stored)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_tiles_that_begin_within_rows(models, tmp_path, monkeypatch, method):
    monkeypatch.setattr("pymerge.engine.plan.TILE", 1000)
    stored = merged(models / "stored", tmp_path / "stored", method)
    assert same(merged(models, tmp_path / "view", method, align=str(models / "perms.safetensors")), stored)
