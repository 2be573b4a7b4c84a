"""Every output loads with transformers and gives finite logits."""

from __future__ import annotations

import pytest
import torch

import pymerge

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=96),
    "llama tied": lambda: transformers.LlamaConfig(**SMALL, vocab_size=96, tie_word_embeddings=True),
    "bert": lambda: transformers.BertConfig(**SMALL, vocab_size=96, num_labels=3),
    "vit": lambda: transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_channels=1, num_labels=3),
}
AUTO = {
    "llama": "AutoModelForCausalLM",
    "llama tied": "AutoModelForCausalLM",
    "bert": "AutoModelForSequenceClassification",
    "vit": "AutoModelForImageClassification",
}
METHODS = ("linear", "task_arithmetic", "slerp", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties")


def logits(kind, model):
    generator = torch.Generator().manual_seed(0)
    if kind == "vit":
        return model(
            pixel_values=torch.rand(2, 1, 8, 8, generator=generator, dtype=torch.float32).to(model.dtype)
        ).logits
    return model(input_ids=torch.randint(0, 96, (2, 7), generator=generator)).logits


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """For each architecture a base and two children saved by transformers, sharded and single, in bfloat16."""
    found = {}
    for kind, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp(kind.replace(" ", "_"))
        auto = getattr(transformers, AUTO[kind])
        torch.manual_seed(0)
        model = auto.from_config(config()).to(torch.bfloat16)
        model.save_pretrained(folder / "base", max_shard_size="20KB")
        for t in (1, 2):
            generator = torch.Generator().manual_seed(t)
            with torch.no_grad():
                for p in model.parameters():
                    p += (0.02 * torch.randn(p.shape, generator=generator)).to(p.dtype)
            model.save_pretrained(folder / f"m{t}")
        found[kind] = folder
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_loads_and_gives_finite_logits(families, tmp_path, kind, method):
    folder = families[kind]
    base = None if method == "linear" else folder / "base"
    models = [folder / "m1"] if method == "slerp" else [folder / "m1", folder / "m2"]
    more = {"slerp": {"t": 0.4}, "linear": {}}.get(method, {"weight": 0.4})
    pymerge.merge(
        base, models, method=method, out=tmp_path / "out", options=pymerge.Options(shard_bytes=30_000), **more
    )
    model, report = getattr(transformers, AUTO[kind]).from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="auto"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert logits(kind, model).isfinite().all()
    pymerge.verify(tmp_path / "out", load=True)
