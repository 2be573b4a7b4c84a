"""Each rule of the table fires on models made for it, and is silent where they are not."""

from __future__ import annotations

import pytest
import torch

import pymerge
from pymerge.report.suggestions import RULES

SHAPES = {f"model.layers.{i}.up.weight": (48, 40) for i in range(6)}


def noise(seed, scale=0.1, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in shapes.items()}


def names(*updates, rank=8, spectra=True):
    """Names of the rules that speak of these updates of one base, with what they say."""
    base = noise(99, 1.0)
    models = [{name: base[name] + update[name] for name in base} for update in updates]
    found = pymerge.inspect(base, models, rank=rank, spectra=spectra, options=pymerge.Options(progress=False))
    return {suggestion.rule: suggestion for suggestion in found.suggestions}


def added(*parts):
    return {name: sum(part[name] for part in parts) for name in SHAPES}


def scaled(update, by):
    return {name: tensor * (by(i) if callable(by) else by) for i, (name, tensor) in enumerate(update.items())}


def of_rank(seed, values, left=None):
    """Updates of these singular values; `left`: output directions [48, k]."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, (m, n) in SHAPES.items():
        u, v = (torch.linalg.qr(torch.randn(side, len(values), generator=generator))[0] for side in (m, n))
        out[name] = (u if left is None else left) * torch.tensor(values) @ v.mT
    return out


PLAIN = noise(1), noise(2), noise(3)  # three dense, unrelated updates of one size


def test_shared_subspace():
    basis = torch.linalg.qr(torch.randn(48, 4, generator=torch.Generator().manual_seed(7)))[0]
    values = [8.0, 6.0, 4.0, 2.5]
    found = names(*(of_rank(seed, values, basis) for seed in (1, 2)), rank=4)
    assert "calibrate: svc" in found["shared subspace"].text
    # left spaces are equal, right ones random: mean squared cosine 0.5 + about 4 / 40 / 2
    assert 0.4 < found["shared subspace"].value < 0.65
    assert "shared subspace" not in names(*(of_rank(seed, values) for seed in (1, 2)), rank=4)


def test_sign_conflict():
    found = names(*PLAIN)
    assert "ties" in found["sign conflict"].text
    assert found["sign conflict"].value == pytest.approx(0.5, abs=0.02)  # 34 560 pairs of entries: 7 deviations
    agreeing = [{name: tensor.abs() for name, tensor in update.items()} for update in PLAIN]
    assert "sign conflict" not in names(*agreeing)


def test_opposed_models():
    against = added(noise(4), scaled(PLAIN[0], -0.5))
    found = names(PLAIN[0], against, PLAIN[1])
    assert "<models[0] in memory> and <models[1] in memory>" in found["opposed models"].text
    assert found["opposed models"].value == pytest.approx(-0.5 / 1.25**0.5, abs=0.05)
    assert "opposed models" not in names(*PLAIN)


def test_aligned_models():
    near = [added(PLAIN[0], noise(seed, 0.05)) for seed in (5, 6)]
    found = names(*near)
    assert "linear" in found["aligned models"].text and "model_stock" in found["aligned models"].text
    assert found["aligned models"].value == pytest.approx(1 / 1.25, abs=0.05)
    assert "aligned models" not in names(*PLAIN)


def test_outlier_norm():
    found = names(PLAIN[0], scaled(PLAIN[1], 5.0), PLAIN[2])
    assert "<models[1] in memory>" in found["outlier norm"].text
    assert found["outlier norm"].value == pytest.approx(5.0, rel=0.05)
    assert "outlier norm" not in names(*PLAIN)
    assert "outlier norm" not in names(PLAIN[0], scaled(PLAIN[1], 5.0))  # which of two is out of line?


def test_model_unchanged():
    found = names(PLAIN[0], scaled(PLAIN[1], 0.0))
    assert found["model unchanged"].text.startswith("<models[1] in memory> is the base")
    assert "model unchanged" not in names(*PLAIN)


def test_untouched_tensors():
    frozen = [scaled(update, lambda i: float(i > 1)) for update in PLAIN]
    assert names(*frozen)["untouched tensors"].text.startswith("2 of 6 tensors")
    assert "untouched tensors" not in names(*PLAIN)
    assert "untouched tensors" not in names(*(scaled(update, 0.0) for update in PLAIN))


def test_low_rank():
    found = names(of_rank(1, [3.0, 2.0, 1.0]), PLAIN[1])
    # 9 + 4 of 14 are 93 %: the third direction is needed
    assert "pymerge extract-lora <models[0] in memory> BASE -r 3" in found["low rank"].text
    assert "low rank" not in names(*PLAIN)
    assert "low rank" not in names(of_rank(1, [3.0, 2.0, 1.0]), rank=2)  # 95 % lie beyond what was looked for
    assert "low rank" not in names(of_rank(1, [3.0, 2.0, 1.0]), spectra=False)


def test_sparse_update():
    generator = torch.Generator().manual_seed(3)
    few = {name: tensor * (torch.rand(tensor.shape, generator=generator) < 0.2) for name, tensor in PLAIN[0].items()}
    found = names(few, PLAIN[1])
    changed = sum(int((tensor != 0).sum()) for tensor in few.values()) / sum(t.numel() for t in few.values())
    assert found["sparse update"].value == pytest.approx(changed, abs=1e-3)  # some are lost in the sum with the base
    assert "density: 0.2" in found["sparse update"].text
    assert "sparse update" not in names(*PLAIN)


def test_small_changes():
    found = names(*(scaled(update, 0.003) for update in PLAIN))  # 0.0003: six deviations below 0.002
    assert "dare" in found["small changes"].text
    assert "small changes" not in names(*PLAIN)
    assert "small changes" not in names(scaled(PLAIN[0], 0.003), PLAIN[1])  # all models have to be in the range


def test_shallow_layers():
    found = names(*(scaled(update, lambda i: 2.0 if i < 2 else 1.0) for update in PLAIN))
    assert "calibrate: lines" in found["shallow layers"].text
    assert found["shallow layers"].value == pytest.approx(2.0, rel=0.05)
    assert "shallow layers" not in names(*PLAIN)


def test_every_rule_is_tested_and_has_a_source():
    tested = {name.removeprefix("test_").replace("_", " ") for name in globals() if name.startswith("test_")}
    assert {rule.name for rule in RULES} <= tested
    for rule in RULES:
        assert rule.reason and rule.source and ("arXiv" in rule.source)
        assert rule.fires(rule.threshold)


def test_methods_that_are_named_exist():
    said = " ".join(rule.advice for rule in RULES)
    for method in ("svc", "ties", "linear", "task_arithmetic", "model_stock", "dare", "dare_ties", "lines"):
        assert method in said and pymerge.methods.describe(method)
