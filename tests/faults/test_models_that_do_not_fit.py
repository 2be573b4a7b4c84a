"""S22-S33: models that do not belong together, numbers that are not numbers: errors before a byte is written."""

from __future__ import annotations

import json

import pytest
import torch

import pymerge
from pymerge.errors import (
    ExtraTensor,
    InputError,
    MissingTensor,
    NonFinite,
    Overflow,
    ShapeMismatch,
    UnsupportedDtype,
    VocabMismatch,
)
from tests.models import random_tensors, read_model, same, tuned_from, write_model

BASE = random_tensors(0)


@pytest.fixture
def merge(tmp_path):
    """Merges state dicts through the disk; checks that an error leaves nothing behind."""

    def run(base, models, configs=(None, None, None), **parameters):
        folders = [
            write_model(tmp_path / f"m{i}", m, c) for i, (m, c) in enumerate(zip(models, configs[1:], strict=False))
        ]
        out = tmp_path / "out"
        arguments = {"method": "task_arithmetic"} | parameters
        if arguments["method"] == "task_arithmetic":
            arguments = {"scale": 0.5} | arguments
        try:
            pymerge.merge(write_model(tmp_path / "base", base, configs[0]), folders, out=out, **arguments)
        except pymerge.MergeError:
            assert not out.exists() and not list(tmp_path.glob("out*"))
            raise
        return read_model(out), json.loads((out / "merge.json").read_text())

    return run


def children(count: int = 2):
    return [tuned_from(BASE, 10 + t) for t in range(count)]


def test_S22_shape_mismatch_lists_all_before_computing(merge):
    a, b = children()
    b["layers.0.up.weight"] = torch.zeros(40, 32)
    b["layers.0.up.bias"] = torch.zeros(40)
    with pytest.raises(ShapeMismatch) as error:
        merge(BASE, [a, b])
    text = str(error.value)
    assert "layers.0.up.weight" in text and "[48, 32]" in text and "[40, 32]" in text and "layers.0.up.bias" in text


def test_S23_vocabulary_sizes_differ(merge):
    shapes = {**{n: tuple(t.shape) for n, t in BASE.items()}, "embed_tokens.weight": (64, 32)}
    base = random_tensors(0, shapes)
    a, b = tuned_from(base, 1), tuned_from(base, 2)
    b["embed_tokens.weight"] = torch.cat([b["embed_tokens.weight"], torch.ones(8, 32)])
    with pytest.raises(VocabMismatch, match=r"\[64, 32\].*\[72, 32\].*base_rows"):
        merge(base, [a, b])
    merged, summary = merge(base, [a, b], relax={"vocabulary": "base_rows"})
    expected = base["embed_tokens.weight"] + 0.5 * sum(
        m["embed_tokens.weight"][:64] - base["embed_tokens.weight"] for m in (a, b)
    )
    torch.testing.assert_close(merged["embed_tokens.weight"], expected)
    assert any("vocabulary" in note and "embed_tokens" in note for note in summary["notes"])


def test_S23_rows_that_a_model_lacks_stay_at_the_base(merge):
    base = random_tensors(0, {"embed_tokens.weight": (64, 32)})
    short = {"embed_tokens.weight": base["embed_tokens.weight"][:60] + 1}
    merged, _ = merge(base, [short], relax={"vocabulary": "base_rows"})
    assert torch.equal(merged["embed_tokens.weight"][60:], base["embed_tokens.weight"][60:])
    torch.testing.assert_close(merged["embed_tokens.weight"][:60], base["embed_tokens.weight"][:60] + 0.5)


def test_S24_missing_tensors_are_all_named(merge):
    a, b = children()
    del b["layers.1.norm"], b["layers.0.up.bias"]
    with pytest.raises(MissingTensor) as error:
        merge(BASE, [a, b])
    assert "layers.1.norm" in str(error.value) and "layers.0.up.bias" in str(error.value)
    merged, summary = merge(BASE, [a, b], relax={"missing": "base"})
    torch.testing.assert_close(
        merged["layers.1.norm"], BASE["layers.1.norm"] + 0.5 * (a["layers.1.norm"] - BASE["layers.1.norm"])
    )
    assert any("layers.1.norm" in note for note in summary["notes"])


def test_S25_extra_tensors_only_as_the_recipe_says(merge):
    a, b = children()
    b["layers.0.lora_A.weight"] = torch.ones(4, 32)
    with pytest.raises(ExtraTensor, match="lora_A"):
        merge(BASE, [a, b])
    merged, summary = merge(BASE, [a, b], relax={"extra": "drop"})
    assert "layers.0.lora_A.weight" not in merged and any("lora_A" in note for note in summary["notes"])


def test_S25_extra_tensors_copied(merge):
    a, b = children()
    b["layers.0.lora_A.weight"] = torch.ones(4, 32)
    merged, _ = merge(BASE, [a, b], relax={"extra": "copy"})
    assert torch.equal(merged["layers.0.lora_A.weight"], torch.ones(4, 32))


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


def test_S26_base_tied_child_stores_the_head_too(merge):
    base = random_tensors(0, {"model.embed_tokens.weight": (64, 32)})
    child = tuned_from(base, 1)
    child["lm_head.weight"] = child["model.embed_tokens.weight"].clone()
    merged, _ = merge(base, [child], configs=(TIED, TIED))
    assert list(merged) == ["model.embed_tokens.weight"]


def test_S26_base_untied_child_tied(merge):
    base = random_tensors(0, {"model.embed_tokens.weight": (64, 32), "lm_head.weight": (64, 32)})
    child = tuned_from(base, 1)
    del child["lm_head.weight"]
    merged, summary = merge(base, [child], configs=(UNTIED, TIED))
    head = base["lm_head.weight"]
    torch.testing.assert_close(merged["lm_head.weight"], head + 0.5 * (child["model.embed_tokens.weight"] - head))
    assert any("tied" in note for note in summary["notes"])


def test_S26_base_tied_child_untied_is_refused(merge):
    base = random_tensors(0, {"model.embed_tokens.weight": (64, 32)})
    child = tuned_from(base, 1)
    child["lm_head.weight"] = torch.ones(64, 32)
    with pytest.raises(ExtraTensor, match="lm_head"):
        merge(base, [child], configs=(TIED, UNTIED))


def test_S27_quantised_weights_are_refused(merge):
    quantised = {"layers.0.weight": torch.zeros(8, 8, dtype=torch.uint8), "layers.0.scales": torch.ones(8)}
    with pytest.raises(UnsupportedDtype, match="layers.0.weight.*U8.*dequantise"):
        merge(quantised, [dict(quantised)])


def test_S27_fp8_is_refused(merge):
    fp8 = {"layers.0.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn)}
    with pytest.raises(UnsupportedDtype, match="F8_E4M3"):
        merge(fp8, [dict(fp8)])


def test_S28_integer_buffers_are_copied_and_must_agree(merge):
    base = {**BASE, "position_ids": torch.arange(9), "mask": torch.ones(3, dtype=torch.bool)}
    child = {**tuned_from(BASE, 1), "position_ids": torch.arange(9), "mask": torch.ones(3, dtype=torch.bool)}
    merged, _ = merge(base, [child])
    assert torch.equal(merged["position_ids"], torch.arange(9)) and torch.equal(merged["mask"], base["mask"])


def test_S28_a_buffer_that_a_model_does_not_store_is_copied(merge):
    """Older checkpoints store position_ids, newer ones of the same model do not."""
    base = {**BASE, "position_ids": torch.arange(9)}
    merged, summary = merge(base, [tuned_from(BASE, 1), {**tuned_from(BASE, 2), "position_ids": torch.arange(9)}])
    assert torch.equal(merged["position_ids"], torch.arange(9))
    assert any("buffer" in note and "position_ids" in note for note in summary["notes"])


def test_S28_unequal_integer_buffers(merge):
    base = {**BASE, "position_ids": torch.arange(9)}
    child = {**tuned_from(BASE, 1), "position_ids": torch.arange(9) + 1}
    with pytest.raises(InputError, match="position_ids"):
        merge(base, [child])
    merged, _ = merge(base, [child], relax={"buffers": "base"})
    assert torch.equal(merged["position_ids"], torch.arange(9))


def test_S29_mixed_dtypes_equal_the_widened_run(merge, tmp_path):
    a, b = children()
    a16 = {n: t.to(torch.bfloat16) for n, t in a.items()}
    b16 = {n: t.to(torch.float16) for n, t in b.items()}
    mixed, _ = merge(BASE, [a16, b16])
    widened = pymerge.merge(
        BASE, [{n: t.float() for n, t in m.items()} for m in (a16, b16)], method="task_arithmetic", scale=0.5
    )
    assert same(mixed, widened)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear", "breadcrumbs", "slerp"])
def test_S30_S31_non_finite_input_is_named(merge, value, method):
    a, b = children()
    b["layers.0.up.weight"][3, 5] = value
    with pytest.raises(NonFinite) as error:
        if method == "linear":
            pymerge.merge(None, [a, b], method=method)
        elif method == "slerp":
            merge(BASE, [b], method=method, t=0.5)
        else:
            merge(BASE, [a, b], method=method)
    text = str(error.value)
    assert "layers.0.up.weight" in text and "1 of 1536" in text and "[3, 5]" in text


def test_S30_in_a_tensor_that_is_only_copied(merge):
    a, b = children()
    base = {n: t.clone() for n, t in BASE.items()}
    base["layers.1.norm"][7] = float("nan")
    with pytest.raises(NonFinite, match=r"layers.1.norm.*base.*\[7\]"):
        merge(base, [a, b], exclude=["layers.1.norm"])


def test_S30_kept_on_request_and_reported(merge):
    a, b = children()
    b["layers.0.up.weight"][3, 5] = float("nan")
    merged, summary = merge(BASE, [a, b], relax={"nonfinite": "keep"})
    assert merged["layers.0.up.weight"].isnan().sum() == 1 and summary["relaxations"] == {"nonfinite": "keep"}


def test_S32_overflow_of_the_output_dtype(merge):
    child = tuned_from(BASE, 1)
    child["layers.0.up.weight"][0, 0] = 1e6
    with pytest.raises(Overflow, match=r"layers.0.up.weight: 1 .*F16.*5e\+05.*bfloat16"):
        merge(BASE, [child], out_dtype="float16")
    merged, _ = merge(BASE, [child], out_dtype="float16", relax={"overflow": "clamp"})
    assert merged["layers.0.up.weight"][0, 0] == 65504 and merged["layers.0.up.weight"].isfinite().all()


@pytest.mark.parametrize(
    "method", ["task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties"]
)
def test_S33_zero_deltas_give_the_base(merge, method):
    merged, _ = merge(BASE, [dict(BASE), dict(BASE)], method=method, weight=1.0)
    assert same(merged, BASE)


def test_S33_slerp_and_linear_of_one_model(merge):
    merged, _ = merge(BASE, [dict(BASE)], method="slerp", t=0.3)
    torch.testing.assert_close(merged, BASE, rtol=1e-6, atol=1e-7)
    mean = pymerge.merge(None, [dict(BASE) for _ in range(3)], method="linear")
    torch.testing.assert_close(mean, BASE, rtol=2**-23, atol=0)  # (x + x + x) / 3: at most one unit in the last place
    half = {n: t.bfloat16() for n, t in BASE.items()}
    assert same(pymerge.merge(None, [dict(half) for _ in range(3)], method="linear"), half)


def test_zero_dimensional_one_entry_and_empty_tensors(merge):
    base = {"scale": torch.tensor(2.0), "one": torch.tensor([3.0]), "none": torch.zeros(0, 4)}
    child = {"scale": torch.tensor(4.0), "one": torch.tensor([5.0]), "none": torch.zeros(0, 4)}
    merged, _ = merge(base, [child])
    assert merged["scale"].shape == () and merged["scale"] == 3.0 and merged["one"].tolist() == [4.0]
    assert merged["none"].shape == (0, 4)
