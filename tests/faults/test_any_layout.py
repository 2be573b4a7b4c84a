"""Any names, shapes, dtypes, shard sizes and thread counts: the merged files hold what went in, for every reader."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import pymerge
from tests.models import read_model, same

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool)
NAMES = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=30).filter(
    lambda s: s != "__metadata__"
)
SHAPES = st.lists(st.sampled_from((0, 1, 2, 3, 7, 64)), max_size=4).filter(lambda s: math.prod(s) <= 4096).map(tuple)
TENSORS = st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from((*FLOATS, *OTHERS))), min_size=1, max_size=12)


def filled(kinds) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(-9, 9, s, generator=generator).to(d) for name, (s, d) in kinds.items()}


@settings(max_examples=60, deadline=None)
@given(kinds=TENSORS, shard=st.integers(1, 40_000), threads=st.integers(1, 4), shards=st.integers(1, 3))
def test_a_model_merged_with_itself_is_itself(kinds, shard, threads, shards):
    tensors = filled(kinds)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        written = [folder / "a" / f"part{i}.safetensors" for i in range(min(shards, len(tensors)))]
        (folder / "a").mkdir()
        place = {name: written[i % len(written)] for i, name in enumerate(tensors)}
        for file in written:
            save_file({n: t for n, t in tensors.items() if place[n] == file}, file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file.name for name, file in place.items()}}
        (folder / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
        options = pymerge.Options(memory=150_000_000, threads=threads, shard_bytes=shard, progress=False)
        pymerge.merge(None, [folder / "a"], method="linear", weight=1.0, out=folder / "out", options=options)
        merged = read_model(folder / "out")
        assert same(merged, tensors)
        files = sorted((folder / "out").glob("*.safetensors"))
        if len(files) > 1:
            said = json.loads((folder / "out" / "model.safetensors.index.json").read_text())
            assert said["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
            for name, file in said["weight_map"].items():
                with safe_open(folder / "out" / file, "pt") as opened:
                    assert torch.equal(opened.get_tensor(name), tensors[name])
        pymerge.verify(folder / "out")


@settings(max_examples=6, deadline=None)
@given(layers=st.integers(1, 4), heads=st.sampled_from((1, 2, 4)), shard=st.integers(1, 200_000), tied=st.booleans())
def test_transformers_loads_every_layout(layers, heads, shard, tied):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=heads,
        vocab_size=64,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model.save_pretrained(folder / "a")
        options = pymerge.Options(memory=150_000_000, threads=1, shard_bytes=shard, progress=False)
        pymerge.merge(None, [folder / "a"], method="linear", weight=1.0, out=folder / "out", options=options)
        loaded = transformers.LlamaForCausalLM.from_pretrained(folder / "out")
        assert same(dict(loaded.state_dict()), dict(model.state_dict()))
