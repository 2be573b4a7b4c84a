"""fp8 models are merged by the values that they stand for, and load afterwards; other quantised formats are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.checkpoint import open_checkpoint
from pymerge.errors import MergeError, NonFinite, UnsupportedDtype
from tests.mixtures import equal, loaded, logits, made, save_both, values_of

transformers = pytest.importorskip("transformers")

PATHS = ("base", "one", "two")
EXPERTS = "model.layers.1.mlp.experts"

BLOCK = 16


def quantised(folder, out, *, how="block"):
    """A copy with the matrices of all layers in fp8, and the float32 values that they stand for."""
    shutil.copytree(folder, out)
    tensors, exact = {}, {}
    for name, tensor in values_of(folder).items():
        exact[name] = tensor
        tensors[name] = tensor
        if ".layers." not in name or tensor.dim() != 2 or "norm" in name or name.endswith(".gate.weight"):
            continue
        m, n = tensor.shape
        size = {"block": (BLOCK, BLOCK), "row": (1, n), "tensor": (m, n)}[how]
        rows, columns = -(-m // size[0]), -(-n // size[1])
        padded = torch.zeros(rows * size[0], columns * size[1])
        padded[:m, :n] = tensor.float()
        grid = padded.reshape(rows, size[0], columns, size[1])
        scale = grid.abs().amax((1, 3)).clamp(min=1e-12) / 448
        entries = (grid / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        value = (entries.float() * scale[:, None, :, None]).reshape(padded.shape)[:m, :n]
        tensors[name] = entries.reshape(padded.shape)[:m, :n].contiguous()
        exact[name] = value.contiguous()
        if how == "block":
            tensors[f"{name}_scale_inv"] = scale
        else:
            tensors[f"{name}_scale"] = scale if how == "row" else scale.reshape(())
            tensors[name.replace(".weight", ".input_scale")] = torch.ones(1)
    for file in out.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    method = {"block": "fp8", "row": "compressed-tensors", "tensor": "modelopt"}[how]
    config["quantization_config"] = {"quant_method": method}
    if how == "block":
        config["quantization_config"] |= {"fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    (out / "config.json").write_text(json.dumps(config))
    return exact


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamas")
    for seed, path in enumerate(PATHS):
        config = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4, vocab_size=96
        )
        torch.manual_seed(seed)
        transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder / path)
    return folder


def task_arithmetic(base, models, scale):
    """By the values themselves."""
    return {
        name: (base[name].float() + scale * sum(m[name].float() - base[name].float() for m in models)).bfloat16()
        for name in base
    }


@pytest.mark.parametrize("how", ["block", "row", "tensor"])
@pytest.mark.parametrize("which", ["all", "models", "base"])
def test_fp8_models_are_merged_by_their_values(llamas, which, how, tmp_path):
    exact = {path: values_of(llamas / path) for path in PATHS}
    folders = {path: llamas / path for path in PATHS}
    for path in {"all": PATHS, "models": PATHS[1:], "base": PATHS[:1]}[which]:
        folders[path] = tmp_path / path
        exact[path] = quantised(llamas / path, folders[path], how=how)
    base, *models = folders.values()
    summary = pymerge.merge(base, models, method="task_arithmetic", scale=0.5, out=tmp_path / "out")
    found = values_of(tmp_path / "out")
    expected = task_arithmetic(exact["base"], [exact["one"], exact["two"]], 0.5)
    assert found.keys() == expected.keys()
    for name in expected:  # the last bit may differ: sums of float32 in another order, then rounded
        assert torch.allclose(found[name].float(), expected[name].float(), rtol=2**-7, atol=1e-8), name
        assert (found[name] != expected[name]).float().mean() < 0.01
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert any("fp8 weights read with their scales: 14" in note for note in summary["notes"])
    assert any("input_scale" in note for note in summary["notes"]) == (how != "block")
    model = loaded(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits(model)).all()


def test_fp8_is_read_as_transformers_reads_it(tmp_path):
    """A model alone, and the one that transformers dequantises."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=96
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    quantised(tmp_path / "plain", tmp_path / "fp8")
    theirs = loaded(tmp_path / "fp8").state_dict()  # without a GPU, transformers dequantises
    pymerge.merge(None, [tmp_path / "fp8"], method="linear", out=tmp_path / "out")
    assert equal(loaded(tmp_path / "out").state_dict(), {n: t.to(torch.bfloat16) for n, t in theirs.items()})


def test_fp8_experts_of_each_into_a_fused_base(tmp_path):
    """The two views on top of one another."""
    places = {path: save_both(made("DeepseekV3Config", seed), tmp_path / path) for seed, path in enumerate(PATHS[:2])}
    exact = quantised(places["one"]["each"], tmp_path / "fp8")
    pymerge.merge(
        places["base"]["fused"], [tmp_path / "fp8"], method="task_arithmetic", scale=1.0, out=tmp_path / "out"
    )
    found = values_of(tmp_path / "out")[f"{EXPERTS}.down_proj"]
    base = values_of(places["base"]["fused"])[f"{EXPERTS}.down_proj"].float()
    values = torch.stack([exact[f"{EXPERTS}.{i}.down_proj.weight"] for i in range(12)])
    assert torch.equal(found, (base + (values - base)).bfloat16())
    assert torch.isfinite(logits(loaded(tmp_path / "out"))).all()


def test_fp8_models_are_observed_by_their_values(llamas, tmp_path):
    """Streamed, and side by side in a merge, as the same weights in bfloat16 are."""
    quantised(llamas / "one", tmp_path / "fp8")
    pymerge.merge(None, [tmp_path / "fp8"], method="linear", out=tmp_path / "plain")
    batch = {"input_ids": torch.randint(3, 96, (4, 9), generator=torch.Generator().manual_seed(0))}
    found = [
        pymerge.observe(tmp_path / name, [batch], stream_to=tmp_path / f"{name}.stats.safetensors")
        for name in ("fp8", "plain")
    ]
    assert found[0].modules == found[1].modules
    for module in found[0].modules:
        assert torch.equal(found[0][module].second_moment(), found[1][module].second_moment())
    for name in ("fp8", "plain"):
        models = [tmp_path / name, llamas / "two"]
        out = tmp_path / f"{name} merged"
        pymerge.merge(llamas / "base", models, method="regmean", data=[batch] * 2, out=out)
    ours, theirs = (values_of(tmp_path / f"{name} merged") for name in ("fp8", "plain"))
    for name in theirs:  # the weights themselves are merged unrounded
        assert torch.linalg.vector_norm(ours[name].float() - theirs[name].float()) <= 4e-3 * theirs[name].float().norm()


def changed(folder, out, change):
    """A copy of a model of one file with other tensors."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


QUERY = "model.layers.0.self_attn.q_proj.weight"


def test_nan_in_fp8_names_the_model_and_the_tensor(llamas, tmp_path):
    quantised(llamas / "one", tmp_path / "fp8")

    def spoil(tensors):
        tensors[QUERY].view(torch.uint8)[2, 3] = 0x7F

    changed(tmp_path / "fp8", tmp_path / "nan", spoil)
    with pytest.raises(NonFinite, match=rf"(?s){QUERY}.*nan"):
        pymerge.merge(llamas / "base", [tmp_path / "nan"], method="task_arithmetic", out=tmp_path / "out")


def test_fp8_without_scales(llamas, tmp_path):
    quantised(llamas / "one", tmp_path / "fp8")

    def spoil(tensors):
        del tensors[f"{QUERY}_scale_inv"]

    changed(tmp_path / "fp8", tmp_path / "bare", spoil)
    with pytest.raises(UnsupportedDtype, match=rf"{QUERY}: F8_E4M3 in .*bare: fp8 without scales"):
        pymerge.merge(llamas / "base", [tmp_path / "bare"], method="task_arithmetic", out=tmp_path / "out")


def test_fp8_in_memory(llamas, tmp_path):
    quantised(llamas / "one", tmp_path / "fp8")
    held = load_file(tmp_path / "fp8" / "model.safetensors")
    with pytest.raises(UnsupportedDtype, match="fp8 with scales, in memory.*folder"):
        pymerge.merge(values_of(llamas / "base"), [held], method="task_arithmetic")


def test_another_block_size_is_another_merge(llamas, tmp_path):
    """What config.json says of the weights belongs to what an interrupted merge must find again."""
    quantised(llamas / "one", tmp_path / "fp8")
    found = []
    for block in (BLOCK, BLOCK + 1):  # as many scales, of other entries
        config = json.loads((tmp_path / "fp8" / "config.json").read_text())
        config["quantization_config"]["weight_block_size"] = [BLOCK, block]
        (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
        with open_checkpoint(tmp_path / "fp8") as model:
            found.append(model.fingerprint())
    assert found[0]["files"] == found[1]["files"] and found[0] != found[1]


W = "model.layers.0.mlp.down_proj"
U8, I32 = torch.zeros(16, 16, dtype=torch.uint8), torch.zeros(16, 16, dtype=torch.int32)
FORMATS: dict[str, tuple[dict[str, torch.Tensor], str, str]] = {
    "GPTQ": ({f"{W}.qweight": I32, f"{W}.qzeros": I32, f"{W}.g_idx": I32[0], f"{W}.scales": U8}, "GPTQ", "made of"),
    "AWQ": ({f"{W}.qweight": I32, f"{W}.qzeros": I32, f"{W}.scales": U8.half()}, "AWQ", "made of"),
    "nf4": ({f"{W}.weight": U8, f"{W}.weight.absmax": U8[0].float()}, "bitsandbytes, 4 bits", "model.dequantize"),
    "int8": ({f"{W}.weight": U8.char(), f"{W}.SCB": U8[0].float()}, "bitsandbytes, 8 bits", "model.dequantize"),
    "MXFP4": ({"e.gate_up_proj_blocks": U8, "e.gate_up_proj_scales": U8}, "MXFP4", "Mxfp4Config.dequantize=True"),
    "W8A8": ({f"{W}.weight": U8.char(), f"{W}.weight_scale": U8.float()}, "integers", "CompressedTensorsConfig"),
    "W4A16": (
        {f"{W}.weight_packed": I32, f"{W}.weight_scale": U8.half()},
        "compressed-tensors, packed",
        "CompressedTensorsConfig",
    ),
}


@pytest.mark.parametrize(("tensors", "what", "todo"), FORMATS.values(), ids=FORMATS)
def test_other_formats_say_what_they_are_and_what_to_do(llamas, tensors, what, todo, tmp_path):
    def quantise(held):
        held.pop(f"{W}.weight")
        held.update({name: tensor.clone() for name, tensor in tensors.items()})

    folder = changed(llamas / "one", tmp_path / "quantised", quantise)
    with pytest.raises(UnsupportedDtype, match=rf"quantised: {what}.*{todo}") as error:
        pymerge.merge(llamas / "base", [folder, llamas / "two"], method="task_arithmetic", out=tmp_path / "out")
    assert len(str(error.value).splitlines()) == 1
    assert isinstance(error.value, MergeError)
