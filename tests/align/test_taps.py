"""Activations alone find a shuffled model back: every tap sees its units, by the names of the checkpoint."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from pymerge.align import find_permutations
from pymerge.align.specs import spec_for
from tests.align.tiny import MODELS, Tiny, scrambled

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "qwen3", "mixtral", "opt", "roberta-classifier"])
def test_activations_find_a_shuffled_model_back(name, tmp_path):
    model = Tiny(MODELS[name], tmp_path / "a", torch.float32)
    stored = {
        key: tensor.contiguous()
        for key, tensor in model.aligned(scrambled(spec_for(model.shapes, model.config))).items()
    }
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    save_file(stored, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(2, 40, (4, 16, 20), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": batch} for batch in ids]
    found = find_permutations([tmp_path / "a", tmp_path / "b"], batches, alpha=0.0)
    for key, tensor in model.tensors.items():
        assert torch.equal(found.aligned(key, stored[found.source(key, 1)], 1), tensor), key
