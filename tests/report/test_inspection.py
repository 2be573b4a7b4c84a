"""`pymerge.inspect` against float64 references, on models with planted updates."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import pymerge
from pymerge.engine import moments as engine_moments
from pymerge.errors import InputError, NonFinite, RecipeError, UnsupportedDtype
from pymerge.report import measures
from pymerge.report.spectra import tail_estimate
from tests.adapters import SHAPES as ADAPTED
from tests.adapters import TARGETS, random_factors, write_adapter
from tests.models import SHAPES, family, random_tensors, tuned_from, write_model

EPS32, EPS64 = 2.0**-24, 2.0**-53
QUIET = pymerge.Options(progress=False, threads=2)


def inspect(base, models, **more):
    return pymerge.inspect(base, models, options=QUIET, **more)


def with_updates(updates, base=None):
    """A base and a state dict a model: base + update."""
    shapes = {name: tuple(u.shape) for name, u in updates[0].items()}
    base = base or random_tensors(0, shapes)
    return base, [{name: base[name] + update[name] for name in base} for update in updates]


def low_rank(seed, values, m, n, left=None, right=None):
    """[m, n] with these singular values, and its singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    k = len(values)
    u = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0] if left is None else left
    v = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0] if right is None else right
    return (u * torch.tensor(values, dtype=torch.float64)) @ v.mT, u, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_of_a_set_on_disk(tmp_path, dtype):
    """Each number of the summary, from the same bytes in float64 by its definition."""
    base_folder, folders = family(tmp_path, 3, dtype=dtype)
    found = inspect(str(base_folder), [str(f) for f in folders], spectra=False)
    base, models = (
        random_tensors(0, SHAPES, dtype),
        [tuned_from(random_tensors(0, SHAPES, dtype), 10 + t) for t in range(3)],
    )
    assert {t.name for t in found.tensors} == set(SHAPES)
    for tensor in found.tensors:
        name, m = tensor.name, tensor.moments
        w = base[name].double().flatten()
        d = torch.stack([model[name].double().flatten() - w for model in models])
        n, slack = w.numel(), 2 * (EPS32 + w.numel() * EPS64)  # differences are rounded to float32
        assert m.entries == n
        for t in range(3):
            wanted = float(d[t].norm() / w.norm())
            assert measures.relative_norms(m)[t] == pytest.approx(wanted, rel=slack)
            assert measures.changed(m)[t] == float((d[t] != 0).double().mean())
        for s, t in measures.pairs(3):
            wanted = float(d[s] @ d[t] / (d[s].norm() * d[t].norm()))
            assert measures.cosine(m, (s, t)) == pytest.approx(wanted, abs=2 * slack)
            both = (d[s] != 0) & (d[t] != 0)
            assert measures.opposed(m, (s, t)) == int(((d[s] * d[t] < 0) & both).sum()) / int(both.sum())
        contested = (d != 0).sum(0) > 1
        conflict = (d > 0).any(0) & (d < 0).any(0)
        assert measures.conflicted(m) == int(conflict.sum()) / int(contested.sum())
        lost = float(1 - d.sum(0).abs().sum() / d.abs().sum())
        assert measures.cancelled(m) == pytest.approx(lost, abs=6 * slack)


def test_sums_do_not_depend_on_threads_or_tiles(tmp_path, monkeypatch):
    shapes = {"a.weight": (700, 500), "b": (7,)}
    base, folders = family(tmp_path, 2, shapes=shapes, dtype=torch.bfloat16)
    monkeypatch.setattr(engine_moments, "TILE", 1 << 16)

    def run(threads):
        options = pymerge.Options(progress=False, threads=threads)
        return pymerge.inspect(str(base), list(map(str, folders)), spectra=False, options=options).to_dict()

    one, three = run(1), run(3)
    for found in (one, three):
        found.pop("seconds")
    assert one == three
    monkeypatch.setattr(engine_moments, "TILE", 1 << 17)
    for a, b in zip(one["tensors"], run(1)["tensors"], strict=True):
        assert (a["magnitudes"], a["opposed_signs"]) == (b["magnitudes"], b["opposed_signs"])
        assert a["update_norm"] == pytest.approx(b["update_norm"], rel=350_000 * EPS64)


def test_groups_are_sums_of_their_tensors():
    shapes = {f"model.layers.{i}.{k}": (6, 5) for i in range(3) for k in ("q.weight", "k.weight")} | {
        "norm.weight": (5,)
    }
    updates = [random_tensors(seed, shapes, scale=0.1) for seed in (1, 2)]
    base, models = with_updates(updates)
    found = inspect(base, models, spectra=False)
    assert list(found.kinds) == ["model.layers.*.q.weight", "model.layers.*.k.weight", "norm.weight"]
    assert list(found.layers) == [("model.layers", i) for i in range(3)]
    square = sum(float((models[0][n].double() - base[n].double()).square().sum()) for n in shapes if ".1." in n)
    assert found.layers["model.layers", 1].moments.gram[0, 0] == pytest.approx(square, rel=1e-6)
    assert found.whole.moments.entries == sum(math.prod(s) for s in shapes.values())


def test_spectrum_of_a_planted_update():
    """Singular values to float32's accuracy, their certificate, ranks by formula."""
    values = [4.0, 2.0, 1.0, 0.5]
    d, _, _ = low_rank(1, values, 60, 40)
    base, models = with_updates([{"layers.0.up.weight": d.float()}])
    found = inspect(base, models, rank=3).tensors[0].spectra[0]
    noise = EPS32 * float(models[0]["layers.0.up.weight"].norm()) * 2  # of base + update, and of the difference
    assert found.values[0] == pytest.approx(values[:3], abs=noise)
    assert found.certified == (3,)
    assert found.energy[0] == pytest.approx(sum(v**2 for v in values), rel=4 * noise)
    assert found.stable_rank(0) == pytest.approx(sum(v**2 for v in values) / 16, rel=4 * noise)
    assert found.rank_holding(0, 0.9) == 2 and found.rank_holding(0, 0.95) == 3


def test_effective_rank_of_equal_values():
    d, _, _ = low_rank(2, [1.0] * 8, 30, 20)
    base, models = with_updates([{"layers.0.up.weight": d.float()}], {"layers.0.up.weight": torch.zeros(30, 20)})
    found = inspect(base, models, rank=20).tensors[0].spectra[0]
    assert found.effective_ranks[0] == pytest.approx(8, rel=1e-3)
    assert found.certified[0] in (8, 20)  # eight equal values are one space: proven as a whole, or nothing before it


def test_tail_keeps_the_squared_norm():
    for energy in (10.5, 12.0, 30.0):
        top = np.array([9.0, 1.0])
        tail = tail_estimate(top, energy, 20)
        assert tail.sum() == pytest.approx(energy - 10, rel=1e-9)
        assert (np.diff(tail) <= 0).all() and tail[0] <= 1 + 1e-9
    assert not tail_estimate(np.array([1.0]), 1.0, 5).any()
    assert tail_estimate(np.array([1.0]), 7.0, 5).tolist() == [6 / 5] * 5  # more than the last value allows: equal


def test_principal_angles_of_planted_spaces():
    """Two models that share two of four output directions and no input direction."""
    values, m, n = [8.0, 6.0, 4.0, 3.0], 64, 48
    basis = torch.linalg.qr(torch.randn(m, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    a, _, _ = low_rank(0, values, m, n, basis[:, :4], right[:, :4])
    b, _, _ = low_rank(0, values, m, n, basis[:, [0, 1, 4, 5]], right[:, 4:])
    base, models = with_updates([{"layers.0.up.weight": d.float()} for d in (a, b)])
    found = inspect(base, models, rank=4).tensors[0].spectra[0]
    assert found.certified == (4, 4)
    overlap = found.overlaps[0, 1]
    # a perturbation E of the update turns its leading space by at most ||E|| / gap, gap 3 to the null space
    turned = 2 * 4 * EPS32 * float(models[0]["layers.0.up.weight"].norm()) / 3
    assert overlap.left == pytest.approx([1, 1, 0, 0], abs=turned)
    assert overlap.right == pytest.approx([0, 0, 0, 0], abs=turned)
    assert overlap.mean == pytest.approx(0.25, abs=turned)


def test_unproven_directions_have_no_overlap():
    """Equal singular values: nothing of them is called a shared space."""
    update = {"layers.0.up.weight": torch.eye(30)}
    base, models = with_updates([update, update], {"layers.0.up.weight": torch.zeros(30, 30)})
    found = inspect(base, models, rank=4).tensors[0].spectra[0]
    assert found.certified == (0, 0) and found.overlaps[0, 1].rank == 0 and found.overlaps[0, 1].mean is None


def test_tables_and_vectors_have_no_spectrum():
    base = random_tensors(
        0, {"embed_tokens.weight": (9, 4), "lm_head.weight": (9, 4), "norm": (4,), "up.weight": (6, 4)}
    )
    found = inspect(base, [tuned_from(base, 1)], rank=16)
    assert [t.name for t in found.tensors if t.spectra] == ["up.weight"]
    assert len(found.tensors[-1].spectra[0].values[0]) == 4  # not more than the matrix has


def test_experts_stored_as_one_are_matrices_of_their_own():
    name = "model.layers.0.mlp.experts.down_proj"
    base = {name: torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))}
    update = torch.zeros(3, 6, 4)
    update[1, 2, 3] = 5.0
    found = inspect(base, [{name: base[name] + update}], rank=1).tensors[0]
    assert [s.shape for s in found.spectra] == [(6, 4)] * 3
    assert [s.values[0][0] for s in found.spectra] == pytest.approx([0, 5, 0], abs=1e-5)


def test_what_cannot_be_compared_is_listed():
    base = {
        "a": torch.ones(3),
        "b": torch.ones(2, 2),
        "c": torch.ones(4),
        "ids": torch.arange(3),
        "skip.me": torch.ones(1),
    }
    model = {
        "a": torch.ones(3) * 2,
        "b": torch.ones(2, 3),
        "ids": torch.arange(3),
        "skip.me": torch.ones(1),
        "new": torch.ones(1),
    }
    found = inspect(base, [model], exclude=["skip.*"])
    assert [t.name for t in found.tensors] == ["a"]
    assert found.left_out == {
        "b": "[2, 3] in <models[0] in memory>, [2, 2] in the base",
        "c": "absent from <models[0] in memory>",
        "ids": "I64, no floats",
        "skip.me": "excluded",
        "new": "only in <models[0] in memory>",
    }


def test_untouched_tensors():
    base = random_tensors(0)
    same, other = dict(base), dict(base) | {"layers.1.norm": base["layers.1.norm"] + 1}
    found = inspect(base, [same, other], spectra=False)
    assert set(found.untouched()) == set(base) - {"layers.1.norm"}
    assert found.untouched(0) == [t.name for t in found.tensors]


def test_adapters_are_models(tmp_path):
    """base + adapter: the update is s B A, of its rank, and tensors that it leaves alone are untouched."""
    weights = random_tensors(0, ADAPTED)
    base = write_model(tmp_path / "base", weights)
    factors = random_factors(1, {f"{module}.weight": ADAPTED[f"{module}.weight"] for module in TARGETS})
    adapter = write_adapter(tmp_path / "adapter", factors, base)
    found = inspect(str(base), [str(adapter)], rank=8)
    touched = {t.name: t for t in found.tensors if t.moments.both[0, 0]}
    assert set(touched) == {f"{module}.weight" for module in TARGETS}
    for name, tensor in touched.items():
        module = name.removesuffix(".weight")
        update = factors[f"{module}.lora_B.weight"].double() @ factors[f"{module}.lora_A.weight"].double()
        wanted = torch.linalg.svdvals(update)[:8].tolist()
        rounded = 3 * EPS32 * float(weights[name].norm() + update.norm())  # s B A, the sum, the difference
        assert tensor.spectra[0].values[0] == pytest.approx(wanted, abs=rounded)
        assert tensor.spectra[0].rank_holding(0, 0.9999) == 4


def test_bad_input(tmp_path):
    base, folders = family(tmp_path, 1)
    with pytest.raises(RecipeError, match="one fine-tuned model at least"):
        inspect(str(base), [])
    with pytest.raises(RecipeError, match="rank must be at least 1"):
        inspect(str(base), [str(folders[0])], rank=0)
    with pytest.raises(RecipeError, match="nowhere"):
        inspect(str(base), [str(tmp_path / "nowhere")])
    with pytest.raises(InputError, match="no tensor of floats that base and models share"):
        inspect(str(base), [{"other": torch.ones(2)}])
    broken = random_tensors(0)
    broken["embed.weight"][3, 4] = float("nan")
    write_model(tmp_path / "broken", broken)
    with pytest.raises(NonFinite, match=r"embed.weight: NaN or Inf in .*broken: 1 of 2048 entries.*\[3, 4\]"):
        inspect(str(base), [str(tmp_path / "broken")])
    packed = {f"up.{end}": torch.ones(2, 2, dtype=torch.int32) for end in ("qweight", "qzeros", "g_idx")}
    with pytest.raises(UnsupportedDtype, match="GPTQ"):
        inspect(packed, [dict(packed)])
    with pytest.raises(RecipeError, match="raise --memory"):
        pymerge.inspect(str(base), [str(folders[0])], options=pymerge.Options(memory=1000, progress=False))


def test_plain_data_is_json(tmp_path):
    base, folders = family(tmp_path, 2)
    found = inspect(str(base), list(map(str, folders)), rank=4).to_dict()
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again == found
    assert {"suggestions", "whole", "kinds", "layers", "tensors", "untouched", "left_out"} <= set(found)
    tensor = next(t for t in found["tensors"] if t["name"] == "layers.0.up.weight")
    assert len(tensor["spectra"][0]["singular_values"][0]) == 4
    assert tensor["cosine"][0][0] is None and tensor["cosine"][0][1] == tensor["cosine"][1][0]


def test_the_base_is_no_model_of_its_own(tmp_path):
    base, (tuned,) = family(tmp_path, 1)
    state = random_tensors(0, SHAPES)
    for models in ([str(base)], [f"{base}/", str(tuned)], [tuned, base]):
        with pytest.raises(RecipeError, match="is the base itself: there is nothing to compare"):
            inspect(str(base), models)
    with pytest.raises(RecipeError, match="a model: is the base itself"):
        inspect(state, [state])
