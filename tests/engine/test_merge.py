"""Disk, memory, held, swept, tiled, any number of threads: one result, bit for bit; and it is the formula's."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

import pymerge
from pymerge.engine import plan as planning
from pymerge.engine.plan import SLACK, Options
from pymerge.methods.base import Calibrate, Combine, Purify, register
from tests.models import family, interrupted_after, read_model, same, write_model

SHAPES = {
    "model.embed_tokens.weight": (1100, 1024),  # more than one block of partial sums
    "layers.0.w": (257, 129),
    "layers.0.b": (257,),
    "layers.1.w": (64, 64),
    "scalar": (),
}
TIGHT = SLACK + (42 << 20)  # the embedding of four models does not fit into half of 42 MB: swept
SETTINGS = {
    "linear": {"method": "linear"},
    "task_arithmetic": {"method": "task_arithmetic", "scale": 0.4},
    "slerp": {"method": "slerp", "t": 0.3},
    "ties mergekit": {"method": "ties", "style": "mergekit", "weight": [0.5, 1.0, 0.3], "density": 0.3},
    "ties authors": {"method": "ties", "scope": "tensor"},
    "ties global": {"method": "ties", "scope": "global", "density": 0.3, "merge_func": "sum"},
    "dare_linear mergekit": {"method": "dare_linear", "style": "mergekit", "weight": 0.4, "density": 0.3},
    "dare_linear authors": {"method": "dare_linear"},
    "dare_ties": {"method": "dare_ties", "style": "mergekit", "weight": 0.4, "density": 0.3},
    "breadcrumbs mergekit": {
        "method": "breadcrumbs",
        "style": "mergekit",
        "weight": 0.4,
        "density": 0.6,
        "gamma": 0.05,
    },
    "breadcrumbs authors": {"method": "breadcrumbs"},
    "dare, then ties": {"method": "ties", "purify": {"method": "dare"}, "scope": "tensor"},
    "dare, then global ties": {"method": "ties", "purify": {"method": "dare"}},
    "trim, then sum": {"method": "task_arithmetic", "purify": {"method": "trim"}},
    "nuslerp": {"method": "nuslerp", "weight": [0.3, 0.9]},
    "nuslerp rows": {"method": "nuslerp", "weight": [0.3, 0.9], "nuslerp_flatten": False},
    "karcher": {"method": "karcher"},
    "model_stock": {"method": "model_stock"},
    "dare, then model_stock": {"method": "model_stock", "purify": {"method": "dare"}},
    "della mergekit": {"method": "della", "style": "mergekit", "weight": 0.4, "density": 0.3},
}


def inputs(setting, base, models):
    """Base and models as the method takes them."""
    few = {"slerp": 1, "nuslerp": 2}.get(setting["method"], 3)
    return (None if setting["method"] in ("linear", "karcher") else base), models[:few]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_one_result_however_it_is_run(tmp_path, setting, dtype):
    base, models = inputs(setting, *family(tmp_path, 3, SHAPES, dtype))
    results = []
    tight = TIGHT + (20 << 20) if setting["method"] == "della" else TIGHT  # della holds the tensor and its mask
    for i, options in enumerate(
        [
            Options(),
            Options(memory=tight, threads=1),
            Options(memory=tight, threads=3),
            Options(threads=1, shard_bytes=1000),
        ]
    ):
        pymerge.merge(base, models, out=tmp_path / f"out{i}", options=options, **setting)
        results.append(read_model(tmp_path / f"out{i}"))
    in_memory = pymerge.merge(base and read_model(base), [read_model(m) for m in models], **setting)
    assert all(same(results[0], other) for other in [*results[1:], in_memory])
    assert all(t.dtype == dtype for t in results[0].values())


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_the_torch_path_gives_the_same_bits(tmp_path, setting, monkeypatch):
    """What another device runs, here on the CPU: the generic path with torch operators instead of byte buffers."""
    base, models = inputs(setting, *family(tmp_path, 3, SHAPES))
    streamed = pymerge.merge(base and read_model(base), [read_model(m) for m in models], **setting)
    monkeypatch.setattr(planning.Planner, "streams", lambda self, steps: False)
    generic = pymerge.merge(base and read_model(base), [read_model(m) for m in models], **setting)
    assert same(streamed, generic)


def test_an_optional_base(tmp_path):
    """Without one whole weights are merged; on disk and in memory alike."""
    base, models = family(tmp_path, 2, SHAPES, torch.float32)
    zero = {name: torch.zeros_like(x) for name, x in read_model(base).items()}
    for method in ("nuslerp", "multislerp"):
        pymerge.merge(None, models, out=tmp_path / method, method=method)
        without = pymerge.merge(None, [read_model(m) for m in models], method=method)
        assert same(read_model(tmp_path / method), without)
        assert same(without, pymerge.merge(zero, [read_model(m) for m in models], method=method))
        around = pymerge.merge(read_model(base), [read_model(m) for m in models], method=method)
        assert not torch.allclose(around["layers.0.w"], without["layers.0.w"], atol=1e-4)


def test_the_tight_budget_really_sweeps(tmp_path):
    base, models = family(tmp_path, 3, SHAPES)
    recipe = pymerge.Recipe.from_kwargs(base, models, "ties", style="mergekit", weight=1.0, density=0.3)
    modes = {item.entry.name: item.mode for item in pymerge.plan_merge(recipe, Options(memory=TIGHT)).items}
    assert modes["model.embed_tokens.weight"] == "swept" and modes["layers.0.w"] == "held"


def test_task_arithmetic_is_its_formula_in_float64(tmp_path):
    base, models = family(tmp_path, 3, SHAPES)
    w0, tuned = read_model(base), [read_model(m) for m in models]
    merged = pymerge.merge(w0, tuned, method="task_arithmetic", scale=0.4)
    for name, tensor in merged.items():
        b = w0[name].double()
        true = b + 0.4 * sum(t[name].double() - b for t in tuned)
        # T subtractions, T additions, one product, one addition of terms no larger than the largest |W|
        bound = 8 * 2**-24 * max(1.0, float(torch.stack([t[name].abs().max() for t in [w0, *tuned]]).max()))
        assert (tensor.double() - true).abs().max() <= bound


def test_modules_give_a_module_and_stay_as_they_are():
    torch.manual_seed(0)
    base, a, b = (torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4)) for _ in range(3))
    before = {n: t.clone() for n, t in a.state_dict().items()}
    merged = pymerge.merge(base, [a, b], method="task_arithmetic", scale=0.5)
    assert isinstance(merged, torch.nn.Sequential) and merged is not base
    w = [m[0].weight for m in (base, a, b)]
    torch.testing.assert_close(merged[0].weight, w[0] + 0.5 * ((w[1] - w[0]) + (w[2] - w[0])))
    assert all(torch.equal(before[n], t) for n, t in a.state_dict().items())


def test_summary_names_everything_that_was_done(tmp_path):
    base, models = family(tmp_path, 2)
    summary = pymerge.merge(base, models, method="ties", out=tmp_path / "out", exclude=["*.norm"])
    written = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert written["checksums"] == summary["checksums"] and set(written["checksums"]) == set(
        read_model(tmp_path / "out")
    )
    assert any("layers.1.norm" in note for note in written["notes"]) and written["tensors"] == {
        "merged": 3,
        "copied": 1,
    }
    assert written["recipe"]["merge_method"] == "ties" and len(written["inputs"]) == 3
    assert (tmp_path / "out" / "README.md").exists() and (tmp_path / "out" / "config.json").exists()


def test_verify_finds_a_flipped_bit(tmp_path):
    base, models = family(tmp_path, 2)
    out = tmp_path / "out"
    pymerge.merge(base, models, method="task_arithmetic", out=out)
    assert pymerge.verify(out)["tensors"] == 4
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(pymerge.MergeError, match="layers.1.norm.*checksum|checksum"):
        pymerge.verify(out)


def test_small_tensors_cost_little_each(tmp_path):
    """4539 tensors of three entries go through in a handful of batches, not one read-compute-write turn each."""
    shapes = {f"layers.{i}.w": (3,) for i in range(4539)}
    base, models = family(tmp_path, 3, shapes, torch.bfloat16)
    recipe = pymerge.Recipe.from_kwargs(base, models, "ties", scope="tensor")
    from pymerge.engine.ranges import batches

    plan = pymerge.plan_merge(recipe)
    turns = list(batches((item, 0, item.count) for item in plan.items))
    assert sum(len(turn) for turn in turns) == 4539 and len(turns) < 20


@pytest.fixture
def outside_methods():
    """A purify, a combine and a calibrate step that are no element-wise rules, as a spectral method would be."""
    from dataclasses import dataclass

    from pymerge.methods import REGISTRY

    @register("test_halve")
    @dataclass(frozen=True, kw_only=True)
    class Halve(Purify):
        def purify(self, group):
            zero = torch.zeros(()) if group.base is None else group.base.float()
            return tuple((t.float() - zero) / 2 for t in group.tuned)

    @register("test_sum")
    @dataclass(frozen=True, kw_only=True)
    class Sum(Combine):
        def combine(self, group):
            zero = torch.zeros(()) if group.base is None else group.base.float()
            return torch.stack([t.float() - zero for t in group.tuned]).sum(0)

    @register("test_negate")
    @dataclass(frozen=True, kw_only=True)
    class Negate(Calibrate):
        def calibrate(self, update, group):
            return -update

    yield
    for name in ("test_halve", "test_sum", "test_negate"):
        del REGISTRY[name]


def test_steps_that_are_no_rules_compose(tmp_path, outside_methods):
    base, models = family(tmp_path, 2, SHAPES)
    out = tmp_path / "out"
    pymerge.merge(base, models, method="test_sum", purify=["test_halve"], calibrate=["test_negate"], out=out)
    w0, a, b = read_model(base), *(read_model(m) for m in models)
    for name, tensor in read_model(out).items():
        torch.testing.assert_close(
            tensor, w0[name] - ((a[name] - w0[name]) + (b[name] - w0[name])) / 2, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("failing", [1, 2, 4])
def test_resume_with_another_budget_gives_the_same_bytes(tmp_path, failing):
    """Interrupted with small tiles, continued with large ones."""
    base, models = family(tmp_path, 3, SHAPES)
    setting = {"method": "ties", "style": "mergekit", "weight": 1.0, "density": 0.3}
    pymerge.merge(base, models, out=tmp_path / "whole", **setting)
    with interrupted_after(failing):
        pymerge.merge(base, models, out=tmp_path / "out", options=Options(memory=TIGHT, threads=1), **setting)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    pymerge.merge(base, models, out=tmp_path / "out", **setting)
    assert same(read_model(tmp_path / "out"), read_model(tmp_path / "whole"))


def test_yaml_and_python_are_the_same_merge(tmp_path):
    base, models = family(tmp_path, 2)
    text = yaml.safe_dump(
        {
            "base_model": str(base),
            "models": [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(models, (0.3, 0.6), strict=True)],
            "merge_method": "task_arithmetic",
            "parameters": {"lambda": 0.5},
            "dtype": "bfloat16",
        }
    )
    (tmp_path / "r.yaml").write_text(text)
    from pymerge.engine.local import merge_to_disk

    merge_to_disk(pymerge.Recipe.from_yaml(tmp_path / "r.yaml"), tmp_path / "a")
    pymerge.merge(
        base, models, method="task_arithmetic", weight=[0.3, 0.6], scale=0.5, dtype="bfloat16", out=tmp_path / "b"
    )
    assert same(read_model(tmp_path / "a"), read_model(tmp_path / "b"))
    assert json.loads((tmp_path / "a" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_sharded_inputs_in_another_order(tmp_path):
    base, models = family(tmp_path, 2)
    sharded = write_model(tmp_path / "sharded", dict(reversed(read_model(models[1]).items())), shards=3)
    a = pymerge.merge(base, models, method="ties", out=tmp_path / "a") and read_model(tmp_path / "a")
    b = pymerge.merge(base, [models[0], sharded], method="ties", out=tmp_path / "b") and read_model(tmp_path / "b")
    assert same(a, b)
