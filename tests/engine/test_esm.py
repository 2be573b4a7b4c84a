"""ESM through the engine: factors from the norms of all layers, however the merge is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pymerge
from pymerge.engine.plan import SLACK, Options
from pymerge.errors import RecipeError
from pymerge.methods.base import TaskGroup, TensorInfo
from pymerge.methods.pave import Pave
from pymerge.statistics import Moments, Statistics
from pymerge.statistics.store import Header
from tests.methods.esm_problems import ROBERTA, inputs, of_covariance, of_rows, reference
from tests.models import family, random_tensors, read_model, same, tuned_from

SHAPES = {
    "embed_tokens.weight": (30, 24),
    "layers.0.q_proj.weight": (24, 24),
    "layers.0.k_proj.weight": (12, 24),
    "layers.0.up_proj.weight": (40, 24),
    "layers.1.q_proj.weight": (24, 24),
    "layers.1.k_proj.weight": (12, 24),
    "layers.1.up_proj.weight": (40, 24),
    "layers.1.q_proj.bias": (24,),
    "layers.2.q_proj.weight": (24, 24),
    "layers.2.other.weight": (24, 24),
    "norm.weight": (24,),
}
MATRICES = [name for name, shape in SHAPES.items() if len(shape) == 2 and name != "embed_tokens.weight"]
TASKS = 3


def samples_of(name: str, task: int) -> Tensor:
    """q_proj and k_proj of a layer share their input; another layer has another one."""
    return inputs(60, 24, TASKS, seed=int(name.split(".")[1]))[task]


def statistics_of(task: int, transposed: bool = False) -> Statistics:
    """Rows in layer 0, second moments elsewhere; q_proj holds the input of its layer."""
    modules = {n.removesuffix(".weight"): n.rsplit(".", 2)[0] + ".q_proj" for n in MATRICES}
    held: dict[str, Moments] = {
        holder: (of_rows if ".0." in holder else of_covariance)(samples_of(holder, task))
        for holder in dict.fromkeys(modules.values())
    }
    header = Header(
        model={"class": "Test"},
        data={"batches": 1},
        modules=modules,
        transposed=tuple(modules) if transposed else (),
    )
    return Statistics(header=header, held=held, rows={h: m.rows for h, m in held.items()})


def truth(base: Mapping[str, Tensor], tuned: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Updates of section 3 with the factors of 3.4, float64."""
    updates = {}
    for name in MATRICES:
        deltas = [t[name].double() - base[name].double() for t in tuned]
        updates[name] = reference(deltas, [samples_of(name, t) for t in range(TASKS)], **ROBERTA)
    for kind in ("q_proj", "k_proj", "up_proj"):
        names = [name for name in updates if kind in name]
        norms = {name: updates[name].norm() for name in names}
        mean = sum(norms.values()) / len(norms)
        for name in names:
            updates[name] = updates[name] * (norms[name] / mean) ** 2
    return updates


def test_factors_come_from_all_layers_however_it_is_run(tmp_path: Path) -> None:
    base, tuned = family(tmp_path, TASKS, SHAPES)
    files = []
    for t in range(TASKS):
        files.append(tmp_path / f"t{t}.stats.safetensors")
        statistics_of(t).save(files[-1])
    given: dict[str, Any] = {"method": "esm", "statistics": files, "scale": 0.5}
    w0, ws = read_model(base), [read_model(path) for path in tuned]
    merged = pymerge.merge(w0, ws, method="esm", statistics=[statistics_of(t) for t in range(TASKS)], scale=0.5)
    for i, options in enumerate([Options(threads=1), Options(threads=3, memory=SLACK + (17 << 20))]):
        summary = pymerge.merge(base, tuned, out=tmp_path / f"out{i}", options=options, **given)
        assert same(read_model(tmp_path / f"out{i}"), merged)
    expected = truth(w0, ws)
    for name in MATRICES:
        torch.testing.assert_close((merged[name] - w0[name]).double(), 0.5 * expected[name], rtol=1e-3, atol=1e-5)
    assert torch.equal(merged["layers.1.q_proj.bias"], w0["layers.1.q_proj.bias"])
    mean = sum(w["norm.weight"] - w0["norm.weight"] for w in ws) / TASKS
    torch.testing.assert_close(merged["norm.weight"] - w0["norm.weight"], 0.5 * mean)
    factors = {name: facts["layer_factor"] for name, facts in summary["per_tensor"].items() if "rank" in facts}
    assert set(factors) == set(MATRICES) and factors["layers.2.other.weight"] == 1.0
    assert len({factors[f"layers.{i}.q_proj.weight"] for i in range(3)}) == 3


def test_without_layer_power_all_factors_are_1() -> None:
    w0, ws = models()
    given = {"statistics": [statistics_of(t) for t in range(TASKS)]}
    flat = pymerge.merge(w0, ws, method="esm", layer_power=0, **given)
    merged = pymerge.merge(w0, ws, method="esm", **given)
    for name in MATRICES:
        a, b = merged[name] - w0[name], flat[name] - w0[name]
        cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        assert float(cosine) > 0.99999, name
        assert (abs(float(a.norm() / b.norm()) - 1) < 1e-4) == (name == "layers.2.other.weight"), name


def test_stored_transposed() -> None:
    w0, ws = models()
    given: dict[str, Any] = {"method": "esm"}
    plain = pymerge.merge(w0, ws, statistics=[statistics_of(t) for t in range(TASKS)], **given)
    turned = [{n: w.mT.contiguous() if n in MATRICES else w for n, w in model.items()} for model in (w0, *ws)]
    found = [statistics_of(t, transposed=True) for t in range(TASKS)]
    merged = pymerge.merge(turned[0], turned[1:], statistics=found, **given)
    for name in MATRICES:
        torch.testing.assert_close(merged[name].mT, plain[name], rtol=1e-5, atol=1e-6)


def test_parts_are_kinds_of_their_own() -> None:
    w0, ws = models()
    given: dict[str, Any] = {"method": "esm", "statistics": [statistics_of(t) for t in range(TASKS)]}
    parts = pymerge.merge(w0, ws, split={"*.up_proj.weight": 2}, **given)
    for part in (slice(0, 20), slice(20, 40)):
        halves = [{n: w[part] if "up_proj" in n else w for n, w in model.items()} for model in (w0, *ws)]
        alone = pymerge.merge(halves[0], halves[1:], **given)
        for name in MATRICES:
            mine = parts[name][part] if "up_proj" in name else parts[name]
            torch.testing.assert_close(mine, alone[name], rtol=1e-5, atol=1e-6)


def test_joined_matrices_are_one() -> None:
    w0, ws = models()
    found = [statistics_of(t) for t in range(TASKS)]
    pairs = [[f"layers.{i}.q_proj.weight", f"layers.{i}.k_proj.weight"] for i in range(2)]
    joined = pymerge.merge(w0, ws, method="esm", statistics=found, join=pairs)
    fused = [with_joined(model, pairs) for model in (w0, *ws)]
    whole = pymerge.merge(fused[0], fused[1:], method="esm", statistics=[without_k(one) for one in found])
    for name, tensor in with_joined(joined, pairs).items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-6)


def with_joined(model: Mapping[str, Tensor], pairs: list[list[str]]) -> dict[str, Tensor]:
    """q_proj and k_proj below each other under q_proj's name."""
    out = dict(model)
    for q, k in pairs:
        out[q] = torch.cat([out[q], out.pop(k)])
    return out


def without_k(found: Statistics) -> Statistics:
    modules = {name: holder for name, holder in found.header.modules.items() if "k_proj" not in name}
    return replace(found, header=replace(found.header, modules=modules))


def test_behind_pave() -> None:
    """Norms and updates are those of the purified task vectors."""
    w0, ws = models()
    found = [statistics_of(t) for t in range(TASKS)]
    pave = {"method": "pave", "allocation": "none", "rank_ratio": 0.8}
    merged = pymerge.merge(w0, ws, method="esm", statistics=found, purify=pave)
    purified = [dict(w0) for _ in range(TASKS)]
    for name in SHAPES:
        seen = tuple(one[name.removesuffix(".weight")] for one in found) if name in MATRICES else None
        info = TensorInfo(name=name, shape=SHAPES[name], tasks=TASKS)
        group = TaskGroup(info=info, base=w0[name], tuned=tuple(w[name] for w in ws), inputs=seen)
        for t, vector in enumerate(Pave(allocation="none", rank_ratio=0.8).purify(group)):
            purified[t][name] = (w0[name].double() + vector).double()
    base = {name: tensor.double() for name, tensor in w0.items()}
    expected = pymerge.merge(base, purified, method="esm", statistics=found)
    for name in MATRICES:
        torch.testing.assert_close(merged[name].double(), expected[name], rtol=1e-4, atol=1e-5)


def test_a_kind_without_updates_stays_at_the_base() -> None:
    w0, ws = models()
    ws = [{n: w0[n] if "up_proj" in n else w for n, w in model.items()} for model in ws]
    merged = pymerge.merge(w0, ws, method="esm", statistics=[statistics_of(t) for t in range(TASKS)])
    for name in MATRICES:
        assert bool(torch.isfinite(merged[name]).all())
        assert torch.equal(merged[name], w0[name]) == ("up_proj" in name), name


def test_statistics_are_required() -> None:
    w0, ws = models()
    with pytest.raises(RecipeError, match="esm needs `statistics: FILE` beside"):
        pymerge.merge(w0, ws, method="esm")


def models() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    base = random_tensors(0, SHAPES)
    return base, [tuned_from(base, 10 + t, 0.05 * (t + 1)) for t in range(TASKS)]
