"""fp8 weights with scales are what torch makes of them, in every layout of scales, by whole tensors and by ranges."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pymerge import _C
from pymerge.checkpoint import fp8, open_checkpoint
from pymerge.checkpoint.adapted import AdaptedTensor
from pymerge.checkpoint.header import ITEMSIZE, TORCH_NAME
from pymerge.errors import InputError, MergeError, ShapeMismatch, UnsupportedDtype

BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [4, 8]}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def entries(shape, dtype=E4M3, seed=0):
    """Every finite byte, zeros of both signs and subnormals among them."""
    codes = torch.arange(256).to(torch.uint8)
    codes = codes[codes.view(dtype).float().isfinite()]
    chosen = torch.randint(len(codes), (math.prod(shape),), generator=torch.Generator().manual_seed(seed))
    return codes[chosen].view(dtype).reshape(shape)


def scales(shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.01


def write(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    return folder


def by_blocks(weight, scale, rows, columns):
    """What the entries stand for, a loop over blocks."""
    out = torch.empty(weight.shape)
    for i in range(scale.shape[-2]):
        for j in range(scale.shape[-1]):
            block = (..., slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            out[block] = weight.float()[block] * scale[..., i : i + 1, j : j + 1].float()
    return out


@pytest.mark.parametrize("code", [*fp8.FP8, *fp8.SCALES])
def test_all_bits_of_each_dtype(code):
    """As torch widens them, NaN and Inf included."""
    width = ITEMSIZE[code]
    raw = torch.arange(256 ** min(width, 2)).to(torch.int16 if width > 1 else torch.uint8)
    raw = (raw.int() << 16).view(torch.uint8) if width == 4 else raw.view(torch.uint8)
    expected = raw.view(getattr(torch, TORCH_NAME[code])).float().numpy()
    np.testing.assert_array_equal(fp8.widened(raw.numpy().tobytes(), code), expected)


SHAPES = {"even": (12, 24), "ragged": (13, 21), "small": (3, 5), "experts": (3, 6, 10), "rows": (9, 1)}


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_blocks(shape, dtype, scale_dtype, tmp_path):
    grid = (*shape[:-2], math.ceil(shape[-2] / 4), math.ceil(shape[-1] / 8))
    weight, scale = entries(shape, dtype), scales(grid).to(scale_dtype)
    write(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}, BLOCKS)
    with open_checkpoint(tmp_path) as model:
        tensor = model["a.weight"]
        assert list(model) == ["a.weight"]
        assert (tensor.dtype, tensor.stored, tensor.shape) == ("F32", "BF16", shape)
        assert torch.equal(tensor.load(), by_blocks(weight, scale, 4, 8))


CASES = {
    "tensor": ("a.weight_scale", ()),
    "tensor as a list": ("a.weight_scale", (1,)),
    "rows, compressed-tensors and FBGEMM": ("a.weight_scale", (12, 1)),
    "rows as a list": ("a.weight_scale", (12,)),
    "tensor, DeepSeek's own name": ("a.scale", (1,)),
}


@pytest.mark.parametrize("config", [None, {"quant_method": "compressed-tensors", "format": "float-quantized"}])
@pytest.mark.parametrize(("name", "shape"), CASES.values(), ids=CASES)
def test_tensors_and_rows(name, shape, config, tmp_path):
    weight, scale = entries((12, 24)), scales(shape)
    write(tmp_path, {"a.weight": weight, name: scale}, config)
    with open_checkpoint(tmp_path) as model:
        factor = scale.reshape(-1, 1)
        assert torch.equal(model["a.weight"].load(), weight.float() * factor)


def test_experts_as_one_tensor(tmp_path):
    """A scale for each expert, and Llama 4's for each column."""
    weight = entries((3, 6, 10))
    held = {"e.gate_up_proj": weight, "e.gate_up_proj_scale": scales((3, 1, 10))}
    write(
        tmp_path, held | {"e.down_proj": weight, "e.down_proj_scale": scales((3, 1, 1))}, {"quant_method": "fbgemm_fp8"}
    )
    with open_checkpoint(tmp_path) as model:
        assert torch.equal(model["e.gate_up_proj"].load(), weight.float() * scales((3, 1, 10)))
        assert torch.equal(model["e.down_proj"].load(), weight.float() * scales((3, 1, 1)))


def test_blocks_of_compressed_tensors(tmp_path):
    weight, scale = entries((8, 16)), scales((2, 2))
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [4, 8]}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    write(tmp_path, {"a.weight": weight, "a.weight_scale": scale}, config)
    with open_checkpoint(tmp_path) as model:
        assert torch.equal(model["a.weight"].load(), by_blocks(weight, scale, 4, 8))


@pytest.mark.parametrize("block", [64, fp8.BLOCK])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_ranges(shape, block, tmp_path, monkeypatch):
    monkeypatch.setattr(fp8, "BLOCK", block)
    grid = (*shape[:-2], math.ceil(shape[-2] / 4), math.ceil(shape[-1] / 8))
    write(tmp_path, {"a.weight": entries(shape), "a.weight_scale_inv": scales(grid)}, BLOCKS)
    with open_checkpoint(tmp_path) as model:
        tensor = model["a.weight"]
        whole = tensor.load().reshape(-1)
        count = tensor.numel
        for first in range(0, count, 7):
            for some in {0, 1, 11, count - first}:
                some = min(some, count - first)
                out = torch.full((some,), -1.0)
                tensor.read_into(out.view(torch.uint8).numpy().data, 4 * first)
                assert torch.equal(out, whole[first : first + some])
        with pytest.raises(ValueError, match="not entries"):
            tensor.read_into(memoryview(bytearray(4)), 4 * count)
        with pytest.raises(ValueError, match="not entries"):
            tensor.read_into(memoryview(bytearray(4)), 2)


def test_scales_in_another_file(tmp_path):
    weight, scale = entries((8, 16)), scales((2, 2))
    save_file({"a.weight": weight}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"a.weight_scale_inv": scale}, tmp_path / "model-00002-of-00002.safetensors")
    index = {"a.weight": "model-00001-of-00002.safetensors", "a.weight_scale_inv": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": BLOCKS}))
    with open_checkpoint(tmp_path) as model:
        assert torch.equal(model["a.weight"].load(), by_blocks(weight, scale, 4, 8))
        assert len(model.files) == 2


def test_what_else_belongs_to_the_format(tmp_path):
    """Scales of activations go, and are named; all else stays. config.json is to lose what says fp8."""
    static = {f"a.{name}": torch.ones(1) for name in ("input_scale", "k_scale", "activation_scale")}
    rest = {"b.weight": torch.ones(2, 2), "logit_scale": torch.ones(()), "norm.weight": torch.ones(3)}
    write(
        tmp_path, {"a.weight": entries((4, 8)), "a.weight_scale": scales(()), **static, **rest}, {"quant_method": "fp8"}
    )
    with open_checkpoint(tmp_path) as model:
        assert set(model) == {"a.weight", *rest}
        assert model.config_changes == {"quantization_config": None}
        assert any("a.k_scale" in note and "3 tensor(s)" in note for note in model.notes)
        assert torch.equal(model["b.weight"].load(), rest["b.weight"])


def test_a_model_that_has_no_fp8_stays_as_it_is(tmp_path):
    held = {"a.weight": torch.ones(2, 2), "a.weight_scale": torch.ones(1), "a.input_scale": torch.ones(1)}
    write(tmp_path, held, {"quant_method": "fp8"})
    with open_checkpoint(tmp_path) as model:
        assert set(model) == set(held) and not model.notes and not model.config_changes


def test_nested_configs():
    config = {"text_config": {"quantization_config": {"quant_method": "fp8"}}, "compression_config": {"format": "x"}}
    assert [key for key, _ in fp8.quantization_configs(config)] == [
        "compression_config",
        "text_config.quantization_config",
    ]


WRONG: dict[str, tuple[dict, dict | None, type[MergeError], str]] = {
    "grid": ({"a.weight_scale_inv": scales((3, 2))}, BLOCKS, ShapeMismatch, r"\[3, 2\].*expected .*\[2, 2\]"),
    "one where blocks are declared": ({"a.weight_scale_inv": scales((1, 1))}, BLOCKS, ShapeMismatch, r"\[1, 1\]"),
    "blocks of unknown size": ({"a.weight_scale_inv": scales((2, 2))}, None, ShapeMismatch, "weight_block_size"),
    "block size that is none": (
        {"a.weight_scale_inv": scales((2, 2))},
        {"quant_method": "fp8", "weight_block_size": [4, -8]},
        ShapeMismatch,
        "weight_block_size",
    ),
    "columns of a matrix": ({"a.weight_scale": scales((1, 16))}, None, ShapeMismatch, r"\[1, 16\]"),
    "integers": ({"a.weight_scale": torch.ones(8, 1, dtype=torch.uint8)}, None, UnsupportedDtype, "U8"),
    "twice": ({"a.weight_scale": scales(()), "a.weight_scale_inv": scales(())}, None, InputError, "twice"),
    "another format": ({"a.weight_scale": scales(())}, {"quant_method": "quark"}, UnsupportedDtype, "quark"),
}


@pytest.mark.parametrize(("held", "config", "kind", "text"), WRONG.values(), ids=WRONG)
def test_scales_that_do_not_fit(held, config, kind, text, tmp_path):
    write(tmp_path, {"a.weight": entries((8, 16)), **held}, config)
    with pytest.raises(kind, match=text):
        open_checkpoint(tmp_path)


def test_an_adapter_on_fp8_is_computed_on_its_values(tmp_path):
    weight, scale = entries((8, 16)), scales((2, 2))
    write(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}, BLOCKS)
    factors = {"a": torch.randn(2, 16), "b": torch.randn(8, 2)}
    with open_checkpoint(tmp_path) as model, open_checkpoint(factors) as held:
        adapted = AdaptedTensor(model["a.weight"], held["a"], held["b"], 0.5, transposed=False)
        expected = by_blocks(weight, scale, 4, 8) + 0.5 * factors["b"] @ factors["a"]
        assert torch.allclose(adapted.load(), expected, rtol=1e-6, atol=1e-6)
        assert adapted.stored == "BF16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": 30}, "do not go together"),
        ({"first": -1}, "first >= 0"),
        ({"out": bytearray(12)}, "do not go together"),
        ({"scales": bytes(4)}, "do not go together"),
        ({"table": bytes(100)}, "256"),
        ({"block": (0, 8)}, "positive"),
        ({"shape": (4, 0)}, "positive"),
    ],
)
def test_the_native_decoder_stays_within_its_buffers(change, message):
    given = {"source": bytes(4), "out": bytearray(16), "table": bytes(1024), "scales": bytes(8)}
    with pytest.raises(ValueError, match=message):
        _C.decode_scaled(**(given | {"first": 0, "shape": (4, 8), "block": (2, 8)} | change))
