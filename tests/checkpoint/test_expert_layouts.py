"""Experts read in another layout are bit for bit what transformers writes in that layout."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from pymerge.checkpoint import open_checkpoint, stacked
from pymerge.checkpoint.expert_layouts import Mapper
from pymerge.checkpoint.stacked import PartTensor, StackedTensor, TurnedTensor
from pymerge.errors import InputError, MissingTensor, ShapeMismatch
from tests.mixtures import CONFIGS, made, save_both


def mapped(reference, model):
    mapper = Mapper(reference, model, "model")
    return mapper.run(), mapper


def assert_same(view, reference, values):
    assert list(view) == list(reference)
    for name in reference:
        assert view[name].shape == reference[name].shape and view[name].dtype == reference[name].dtype
        assert torch.equal(view[name].load(), values[name].load()), name


@pytest.mark.parametrize("layouts", [("each", "fused"), ("fused", "each")], ids=" from ".join)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_writes(name, layouts, tmp_path):
    pytest.importorskip("transformers")
    places = save_both(made(name), tmp_path)
    to, source = layouts
    with open_checkpoint(places[to]) as reference, open_checkpoint(places[source]) as model:
        assert set(reference) != set(model)
        view, mapper = mapped(reference, model)
        assert not mapper.problems
        assert_same(view, reference, reference)
        (note,) = view.notes
        assert view.fingerprint() == model.fingerprint() | {"notes": [note]} and view.files == model.files
        assert f"{len(mapper.made)} tensor(s)" in note


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def experts(count=3, f=4, h=6, prefix="model.layers.0.mlp.experts"):
    """Tensors of each expert; as one; as one the other way round."""
    gates, ups, downs = (
        [random(*s, seed=10 * i + k) for i in range(count)] for k, s in enumerate([(f, h)] * 2 + [(h, f)])
    )
    each = {}
    for i in range(count):
        for what, values in (("gate_proj", gates), ("up_proj", ups), ("down_proj", downs)):
            each[f"{prefix}.{i}.{what}.weight"] = values[i]
    up = torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)])
    fused = {f"{prefix}.gate_up_proj": up, f"{prefix}.down_proj": torch.stack(downs)}
    turned = {name: value.mT.contiguous() for name, value in fused.items()}
    return {"each": each, "fused": fused, "turned": turned}


SIZES = {"different": (4, 6), "gate and up square": (3, 6), "down square": (5, 5)}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("source", ["each", "fused", "turned"])
@pytest.mark.parametrize("to", ["each", "fused", "turned"])
def test_every_layout_from_every_other(to, source, sizes):
    layouts = experts(11, *sizes)
    with open_checkpoint(layouts[to]) as reference, open_checkpoint(layouts[source]) as model:
        view, mapper = mapped(reference, model)
        assert not mapper.problems
        assert_same(view, reference, reference)
        assert (view is model) == (to == source)


def test_what_the_model_has_more_stays_in_it():
    layouts = experts()
    other = layouts["each"] | {"model.layers.0.mlp.experts.bias": random(3)}
    with open_checkpoint(layouts["fused"]) as reference, open_checkpoint(other) as model:
        view, _ = mapped(reference, model)
        assert set(view) == {*reference, "model.layers.0.mlp.experts.bias"}


def refused(reference, model):
    with open_checkpoint(reference) as ours, open_checkpoint(model) as theirs:
        view, mapper = mapped(ours, theirs)
        assert view is theirs
        return list(mapper.problems.values())


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


def test_an_expert_is_missing():
    layouts = experts()
    problems = refused(layouts["fused"], without(layouts["each"], "model.layers.0.mlp.experts.1.up_proj.weight"))
    assert [kind for kind, _ in problems] == [MissingTensor]
    assert "1.up_proj.weight" in problems[0][1] and "3 experts" in problems[0][1]


def test_experts_of_two_shapes_or_dtypes():
    layouts = experts()
    for other in (random(5, 6), random(4, 6).float()):
        problems = refused(layouts["fused"], layouts["each"] | {"model.layers.0.mlp.experts.1.up_proj.weight": other})
        assert [kind for kind, _ in problems] == [ShapeMismatch]


def test_another_number_of_experts():
    four, three = experts(4), experts(3)
    problems = refused(four["each"], three["fused"])
    assert [kind for kind, _ in problems] == [ShapeMismatch] * 2  # gate and up, down
    assert "[3, 8, 6]" in problems[0][1] and "4 experts" in problems[0][1]


def test_interleaved_experts_have_no_layout_per_expert():
    layouts = experts()
    biased = layouts["turned"] | {"model.layers.0.mlp.experts.gate_up_proj_bias": random(3, 8)}
    problems = refused(layouts["each"], biased)
    assert InputError in {kind for kind, _ in problems}
    assert any("gpt-oss" in text and "Merge models of one layout" in text for _, text in problems)


def file_of(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    return open_checkpoint(tmp_path)


def assert_ranges(tensor, expected):
    whole = expected.reshape(-1)
    assert torch.equal(tensor.load(), expected)
    for first in range(0, tensor.numel, 5):
        for count in {0, 1, 7, 50, tensor.numel - first}:
            count = min(count, tensor.numel - first)
            out = torch.zeros(count, dtype=expected.dtype)
            if count:
                tensor.read_into(out.view(torch.uint8).numpy().data, first * expected.element_size())
            assert torch.equal(out, whole[first : first + count])
    with pytest.raises(ValueError, match="not entries"):
        tensor.read_into(memoryview(bytearray(8)), tensor.nbytes)


@pytest.mark.parametrize("scratch", [20, 100, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(7, 12), (3, 5, 4), (2, 1, 9)])
def test_turned_ranges(shape, dtype, scratch, tmp_path, monkeypatch):
    monkeypatch.setattr(stacked, "SCRATCH", scratch)
    values = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    with file_of(tmp_path, {"a": values}) as model:
        assert_ranges(TurnedTensor(model["a"]), values.mT.contiguous())


def test_stacked_and_cut_ranges(tmp_path):
    values = {str(i): torch.arange(6).reshape(2, 3) + 10 * i for i in range(4)}
    with file_of(tmp_path, values) as model:
        whole = StackedTensor("all", [model[name] for name in values], (2, 4, 3))
        expected = torch.stack(list(values.values())).reshape(2, 4, 3)
        assert_ranges(whole, expected)
        assert_ranges(PartTensor("part", whole, 9, (2, 3)), expected.reshape(-1)[9:15].reshape(2, 3))
        with pytest.raises(ValueError, match="are not"):
            StackedTensor("all", [model["0"]], (2, 4, 3))
        with pytest.raises(ValueError, match="is not in"):
            PartTensor("part", whole, 20, (2, 3))
