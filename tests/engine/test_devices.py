"""Several devices: one result wherever items are computed; the plan is kept; nothing is used before it is there."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import pymerge
from pymerge.cli import app
from pymerge.engine.describe import describe_plan
from pymerge.engine.devices import (
    BACKENDS,
    DEVICE_SLACK,
    Device,
    cost,
    devices_of,
    names_of,
    placed,
    together,
)
from pymerge.engine.local import plan_merge
from pymerge.engine.plan import Options
from pymerge.errors import DeviceMemoryError, OutputError, RecipeError
from pymerge.recipe import Recipe
from tests.engine.fake_device import FakeBackend, fake_devices
from tests.models import family, interrupted_after, read_model, same

SHAPES = {
    "model.embed_tokens.weight": (300, 64),
    **{f"layers.{i}.{name}.weight": shape for i in range(4) for name, shape in
       {"q_proj": (64, 64), "k_proj": (32, 64), "up": (160, 64), "down": (64, 160)}.items()},
    **{f"layers.{i}.norm": (64,) for i in range(4)},
    "scalar": (),
}  # fmt: skip
SETTINGS = {
    "linear": {"method": "linear"},
    "ties": {"method": "ties", "scope": "tensor", "density": 0.3},
    "global ties": {"method": "ties", "scope": "global", "density": 0.3},
    "global pcb": {"method": "pcb"},
    "tsv_m": {"method": "tsv_m"},
    "iso_c, svc": {"method": "iso_c", "calibrate": "svc"},
    "trim, tsv_m": {"method": "tsv_m", "purify": {"method": "trim"}},
}


@pytest.fixture
def fakes(monkeypatch) -> type[FakeBackend]:
    found, backend = fake_devices()
    monkeypatch.setitem(BACKENDS, "fake", backend)
    return found


@pytest.fixture
def models(tmp_path):
    return family(tmp_path, 2, SHAPES, torch.bfloat16)


def plan_of(models, device: str, options: dict | None = None, **setting):
    base, tuned = models
    recipe = Recipe.from_kwargs(str(base), [str(m) for m in tuned], setting.pop("method"), **setting)
    return plan_merge(recipe, Options(device=device, threads=2, **(options or {})))


# one result


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_one_result_wherever_items_are_computed(tmp_path, models, fakes, setting):
    base, tuned = models
    results = {}
    for device in ("cpu", "fake", "fake:1,fake:0", "fake:0,fake:1,cpu", "auto"):
        given = {} if setting["method"] == "linear" else {"base": base}
        pymerge.merge(
            given.get("base"), tuned, out=tmp_path / device, options=Options(device=device, threads=2), **setting
        )
        results[device] = read_model(tmp_path / device)
        in_memory = pymerge.merge(
            given.get("base") and read_model(base),
            [read_model(m) for m in tuned],
            options=Options(device=device, threads=2),
            **setting,
        )
        assert same(results["cpu"], results[device]) and same(results["cpu"], in_memory)
    used = {made.index for made in fakes.made if "compute" in made.log}
    assert used == {0, 1}
    assert all(not made.pinned and not made.pending and made.allocated == 0 for made in fakes.made)


def test_matrices_that_are_merged_as_one_stay_together(tmp_path, models, fakes):
    base, tuned = models
    setting = {"method": "tsv_m", "join": [["*.q_proj.weight", "*.k_proj.weight"]]}
    plan = plan_of(models, "fake:0,fake:1", **setting)
    for members in together(plan.items):
        assert len({item.device for item in members}) == 1
    assert {len(members) for members in together(plan.items) if members[0].entry.join} == {2}
    results = []
    for device in ("cpu", "fake:0,fake:1"):
        pymerge.merge(base, tuned, out=tmp_path / device, options=Options(device=device, threads=2), **setting)
        results.append(read_model(tmp_path / device))
    assert same(*results)


# which item goes where


def test_items_are_balanced_and_the_plan_is_always_the_same(models, fakes):
    one, other = (plan_of(models, "fake:0,fake:1", method="tsv_m") for _ in range(2))
    where = [(item.entry.name, item.device) for item in one.items]
    assert where == [(item.entry.name, item.device) for item in other.items]
    work = {d.name: sum(cost([i]) for i in one.items if i.device == d.name) for d in one.devices}
    assert max(work.values()) <= 1.1 * min(work.values())
    assert sum(device.items for device in one.devices) == sum(item.device != "cpu" for item in one.items)


def test_the_cpu_takes_element_wise_work_where_it_is_named(models, fakes):
    alone, both = plan_of(models, "fake", method="tsv_m"), plan_of(models, "fake,cpu", method="tsv_m")
    assert all(item.device == "fake:0" for item in alone.items if item.mode != "copy")
    for item in both.items:
        matrix = len(item.shape) == 2 and "embed" not in item.entry.name
        assert item.device == ("fake:0" if matrix else "cpu"), item.entry.name
    assert not plan_of(models, "fake,cpu", method="task_arithmetic").devices[0].items


@dataclass(frozen=True)
class Sized:
    """An item of so many bytes."""

    size: int
    device: str = "a"
    entry = SimpleNamespace(join=None)
    workspace, out_width, flops = 0, 0, 0

    @property
    def count(self) -> int:
        return self.size

    tile = read_bytes = count

    def resident_bytes(self, count: int) -> int:
        return count


def test_a_device_gets_only_what_it_holds():
    items = [Sized(size=size) for size in (10, 100, 60, 50)]
    small, large = Device(name="a", budget=DEVICE_SLACK + 64), Device(name="b", budget=DEVICE_SLACK + 128)
    found, (a, b) = placed(items, [small, large])
    assert [item.device for item in found] == ["b", "b", "a", "a"]
    assert (a.items, a.nbytes, a.peak) == (2, 110, DEVICE_SLACK + 64) and (b.items, b.peak) == (2, DEVICE_SLACK + 110)


# names and budgets


def test_names(fakes):
    assert names_of("cpu") == ((), True)
    assert names_of("fake") == (("fake:0",), False)
    assert names_of(" fake:1, cpu,fake:0") == (("fake:1", "fake:0"), True)
    assert names_of("auto") == (
        tuple(f"cuda:{i}" for i in range(torch.cuda.device_count())) + ("fake:0", "fake:1"),
        True,
    )
    fakes.devices = 0
    assert names_of("auto")[0] == tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("fake,fake:0", "fake:0 is named twice"),
        ("cpu,cpu", "cpu is named twice"),
        ("fake:2", "device 'fake:2' cannot be used here: there is fake:0, fake:1"),
        ("meta", "device 'meta' cannot be used here: expected cpu, cuda, cuda:1, "),
        ("cuda:x", "device 'cuda:x' cannot be used here: expected"),
        ("fake:", "device 'fake:' cannot be used here: expected"),
        ("", "device '' cannot be used here: expected"),
        ("cpu:1", "device 'cpu:1' cannot be used here: expected"),
        ("auto,cpu", "device 'auto' cannot be used here: expected"),
        pytest.param(
            "cuda",
            "device 'cuda' cannot be used here: torch finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_a_device_that_is_not_here(tmp_path, models, fakes, device, said):
    base, tuned = models
    with pytest.raises(RecipeError, match=said):
        pymerge.merge(base, tuned, method="ties", out=tmp_path / "out", options=Options(device=device))
    assert not list(tmp_path.glob("out*"))


def test_budgets(fakes):
    fakes.free = 10**9
    (device,), _ = devices_of("fake", None)
    assert device.budget == 8 * 10**8 and device.memory == device.budget - DEVICE_SLACK
    with pytest.raises(RecipeError, match="fake:0 has 1000 MB free, 1001 MB would be for the merge"):
        devices_of("fake", 1_001_000_000)
    with pytest.raises(RecipeError, match="--device-memory"):
        devices_of("fake", DEVICE_SLACK)


def test_what_does_not_fit_is_refused_or_goes_to_the_cpu(tmp_path, models, fakes):
    base, tuned = models
    tight = {"device_memory": DEVICE_SLACK + 460_000}
    with pytest.raises(RecipeError, match=r"layers.0.down.weight needs .* MB of a device, .* name the CPU too"):
        plan_of(models, "fake", tight, method="tsv_m")
    plan = plan_of(models, "fake,cpu", tight, method="tsv_m")
    where = {item.entry.name: item.device for item in plan.items}
    assert (where["layers.0.up.weight"], where["layers.0.k_proj.weight"]) == ("cpu", "fake:0")
    assert any("8 matrices" in note and "CPU" in note for note in plan.notes)
    for device, options in (("cpu", {}), ("fake,cpu", tight)):
        pymerge.merge(base, tuned, method="tsv_m", out=tmp_path / device, options=Options(device=device, **options))
    assert same(read_model(tmp_path / "cpu"), read_model(tmp_path / "fake,cpu"))


def test_large_tensors_are_tiled_where_the_budget_asks(tmp_path, fakes):
    base, tuned = family(tmp_path, 2, {"embed": (4000, 64), "w": (8, 8)}, torch.bfloat16)
    tight = DEVICE_SLACK + 900_000  # the embeddings, their output and a float32 of it are 2.5 MB
    for setting in ({"method": "task_arithmetic"}, {"method": "nuslerp", "nuslerp_flatten": False}):
        plan = plan_of((base, tuned), "fake", {"device_memory": tight}, **setting)
        (item,) = [item for item in plan.items if item.entry.name == "embed"]
        assert 64 <= item.tile < 4000 * 64 and item.tile % 64 == 0 and item.device == "fake:0"
        results = []
        for device in ("cpu", "fake"):
            options = Options(device=device, device_memory=tight)
            pymerge.merge(base, tuned, out=tmp_path / setting["method"] / device, options=options, **setting)
            results.append(read_model(tmp_path / setting["method"] / device))
        assert same(*results)
        assert fakes.made[-1].peak <= plan.devices[0].peak - DEVICE_SLACK


def test_the_plan_says_what_a_device_gets_and_the_summary_what_it_took(tmp_path, models, fakes):
    base, tuned = models
    plan = plan_of(models, "fake:0,fake:1", method="tsv_m")
    described = describe_plan(plan, Options(device="fake:0,fake:1"))["devices"]
    moved = sum(item.read_bytes + item.count * item.out_width for item in plan.items if item.device != "cpu")
    assert [row["name"] for row in described] == ["fake:0", "fake:1"] and sum(
        row["bytes"] for row in described
    ) == moved
    assert sum(row["flops"] for row in described) == sum(item.flops for item in plan.items)
    options = Options(device="fake:0,fake:1", threads=2)
    summary = pymerge.merge(base, tuned, method="tsv_m", out=tmp_path / "out", options=options)
    for row, planned in zip(summary["devices"], described, strict=True):
        assert row["peak_bytes"] == planned["peak_bytes"]
        assert 0 < row["taken_bytes"] <= row["peak_bytes"] - DEVICE_SLACK
    assert {made.limit for made in fakes.made if made.limit is not None} == {row["budget_bytes"] for row in described}


def test_the_command_line(tmp_path, models, fakes):
    base, tuned = models
    recipe = {"base_model": str(base), "models": [{"model": str(m)} for m in tuned], "merge_method": "tsv_m"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))

    def run(*arguments: str) -> str:
        return CliRunner().invoke(app, [arguments[0], str(tmp_path / "recipe.yaml"), *arguments[1:]]).output

    shown = run("plan", "--device", "fake,fake:1,cpu", "--device-memory", "1GB", "--threads", "2")
    rows = re.findall(r"^fake:\d +(\d+) items, .*, memory at most 0.27 GB *$", shown, re.MULTILINE)
    assert len(rows) == 2 and sum(map(int, rows)) == 16
    rows = json.loads(run("plan", "--device", "auto", "--device-memory", "1GB", "--memory", "2GB", "--json"))["devices"]
    assert [row["budget_bytes"] for row in rows] == [10**9, 10**9]
    assert "fake:7' cannot be used here" in run("merge", str(tmp_path / "out"), "--device", "fake:7")


# what may go wrong


def test_resuming(tmp_path, models, fakes):
    base, tuned = models

    def merge(device: str, out: str = "out") -> None:
        pymerge.merge(base, tuned, method="tsv_m", out=tmp_path / out, options=Options(device=device, threads=2))

    merge("fake:0,fake:1", "whole")
    everything = fakes.sends
    with interrupted_after(4):
        merge("fake:0,fake:1")
    for other in ("fake:0", "fake:1,fake:0", "cpu", "fake:0,fake:1,cpu"):
        with pytest.raises(OutputError, match="(device|placement): was"):
            merge(other)
    sent = fakes.sends
    merge("fake:0,fake:1")
    assert fakes.sends - sent == everything - 4 and same(read_model(tmp_path / "whole"), read_model(tmp_path / "out"))


def test_out_of_memory_keeps_what_is_finished(tmp_path, models, fakes):
    base, tuned = models
    options = Options(device="fake:0,fake:1", threads=2)
    pymerge.merge(base, tuned, method="tsv_m", out=tmp_path / "whole", options=options)
    everything = fakes.sends
    fakes.out_of_memory_at = everything + 15
    with pytest.raises(DeviceMemoryError, match=r"fake:. ran out of memory at layers.* the same command continues"):
        pymerge.merge(base, tuned, method="tsv_m", out=tmp_path / "out", options=options)
    assert all(not made.pinned and not made.pending for made in fakes.made)
    before = fakes.sends
    pymerge.merge(base, tuned, method="tsv_m", out=tmp_path / "out", options=options)
    assert fakes.sends - before < everything
    assert same(read_model(tmp_path / "whole"), read_model(tmp_path / "out"))


def test_bad_numbers_on_a_device(tmp_path, models, fakes):
    base, tuned = models
    bad = read_model(tuned[0])
    bad["layers.2.up.weight"][3, 4] = float("inf")
    with pytest.raises(pymerge.errors.NonFinite, match="layers.2.up.weight"):
        pymerge.merge(read_model(base), [bad], method="tsv_m", options=Options(device="fake"))
    assert all(not made.pinned and not made.pending for made in fakes.made)
