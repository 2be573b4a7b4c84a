"""ESM++ through the engine: the experts beside the merged weights, however the merge is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import pymerge
from pymerge.engine import experts
from pymerge.engine.plan import SLACK, Options
from pymerge.errors import CorruptFile, InputError, Interrupted, RecipeError
from pymerge.methods._esm import expert
from pymerge.methods.base import LayerInput
from tests.engine.observed import MODULES, OBSERVED, SHAPES, saved, statistics_of
from tests.engine.test_esm import MATRICES, TASKS
from tests.engine.test_esm import SHAPES as LAYERS
from tests.engine.test_esm import statistics_of as of_layers
from tests.models import family, read_model, same

FILE = experts.EXPERTS
TRANSPOSED = "layers.1.c_fc.weight"


def observed_family(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, list[Path], list[Path]]:
    """A base, two models, and their statistics: a shared input, fused attention, a Conv1D, kept rows."""
    base, tuned = family(folder, 2, SHAPES, dtype)
    return base, tuned, saved([statistics_of(t, path=path) for t, path in enumerate(tuned)], folder)


def layers_family(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, list[Path], list[Path]]:
    base, tuned = family(folder, TASKS, LAYERS, dtype)
    return base, tuned, saved([of_layers(t) for t in range(TASKS)], folder)


def truth(out: Path, tuned: list[Path], found: list[Any], name: str, rank: int) -> list[Tensor]:
    """B A of each task, for a weight [m, n], from the weights that are in the folder."""
    merged, products = load_file(out / "model.safetensors")[name], []
    for path, statistics in zip(tuned, found, strict=True):
        seen: LayerInput = statistics[name.removesuffix(".weight").removesuffix(".in_proj_weight")]
        pair = [merged, read_model(path)[name]]
        base, weight = (w.mT for w in pair) if name == TRANSPOSED else pair
        left, right = expert(base, weight, seen, rank)
        products.append(left @ right)
    return products


HOW = [("vit", torch.float32, torch.float32), ("vit", torch.bfloat16, torch.bfloat16)]
HOW += [("roberta", torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("preset", "dtype", "factors"), HOW, ids=str)
def test_residuals_are_taken_against_the_weights_as_written(
    tmp_path: Path, preset: str, dtype: torch.dtype, factors: torch.dtype
) -> None:
    base, tuned, statistics = observed_family(tmp_path, dtype)
    given = {"preset": preset, "routed": "*", "expert_rank": 4, "method": "esmpp", "statistics": statistics}
    summary = pymerge.merge(base, tuned, out=tmp_path / "out", **given)
    found = load_file(tmp_path / "out" / FILE)
    assert FILE in summary["side_files"] and pymerge.verify(tmp_path / "out")["tensors"] == len(SHAPES)
    assert {key.removesuffix(".A") for key in found if key.endswith(".A")} == set(OBSERVED)
    for name in OBSERVED:
        assert found[f"{name}.B"].dtype == found[f"{name}.A"].dtype == factors
        expected = truth(tmp_path / "out", tuned, [statistics_of(t) for t in range(2)], name, 4)
        for t, product in enumerate(expected):
            mine = found[f"{name}.B"][t].float() @ found[f"{name}.A"][t].float()
            error = 8 * torch.finfo(factors).eps * float(product.norm())
            torch.testing.assert_close(mine, product, rtol=0, atol=error)
    with safe_open(tmp_path / "out" / FILE, "pt") as file:
        said = file.metadata()
    assert json.loads(said["tasks"]) == list(map(str, tuned)) and (said["rank"], said["pymerge_esmpp"]) == ("4", "1")


def test_full_rank_gives_back_every_model(tmp_path: Path) -> None:
    base, tuned, statistics = layers_family(tmp_path)
    pymerge.merge(
        base,
        tuned,
        method="esmpp",
        preset="vit",
        routed="*",
        expert_rank=99,
        statistics=statistics,
        out=tmp_path / "out",
    )
    found, merged = load_file(tmp_path / "out" / FILE), load_file(tmp_path / "out" / "model.safetensors")
    for name in MATRICES:
        for t, path in enumerate(tuned):
            weight = merged[name] + found[f"{name}.B"][t] @ found[f"{name}.A"][t]
            torch.testing.assert_close(weight, read_model(path)[name], rtol=1e-5, atol=1e-5)


def test_layers_with_one_input_share_their_prototypes(tmp_path: Path) -> None:
    base, tuned, statistics = observed_family(tmp_path)
    pymerge.merge(base, tuned, method="esmpp", routed="*", statistics=statistics, out=tmp_path / "out")
    found = load_file(tmp_path / "out" / FILE)
    with safe_open(tmp_path / "out" / FILE, "pt") as file:
        place = json.loads(file.metadata()["prototypes"])
    assert place["layers.0.q.weight"] == place["layers.0.k.weight"] and len(set(place.values())) == 3
    assert {key for key in found if "prototypes" in key} == set(place.values())
    for name in OBSERVED:
        for t in range(2):
            mean = statistics_of(t)[name.removesuffix(".weight").removesuffix(".in_proj_weight")].mean
            torch.testing.assert_close(found[place[name]][t], mean / mean.norm())


def test_the_bytes_do_not_depend_on_how_it_is_run(tmp_path: Path) -> None:
    base, tuned, statistics = layers_family(tmp_path)
    ways = [Options(threads=1), Options(threads=3, memory=SLACK + (17 << 20)), Options(threads=3, shard_bytes=4000)]
    for i, options in enumerate(ways):
        pymerge.merge(base, tuned, method="esmpp", statistics=statistics, out=tmp_path / f"{i}", options=options)
        assert (tmp_path / f"{i}" / FILE).read_bytes() == (tmp_path / "0" / FILE).read_bytes()
    pymerge.merge(base, tuned, method="esm", statistics=statistics, out=tmp_path / "esm")
    merged = load_file(tmp_path / "0" / "model.safetensors")
    assert same(merged, read_model(tmp_path / "esm"))


def test_in_parts_and_joined(tmp_path: Path) -> None:
    """However a matrix is merged, its experts are those of the whole of it."""
    base, tuned, statistics = observed_family(tmp_path)
    given: dict[str, Any] = {
        "method": "esmpp",
        "preset": "vit",
        "routed": "*",
        "expert_rank": 3,
        "statistics": statistics,
    }
    fused = {"split": {"*.in_proj_weight": 3}, "join": [["layers.0.q.weight", "layers.0.k.weight"]]}
    pymerge.merge(base, tuned, out=tmp_path / "out", **given, **fused)
    found = load_file(tmp_path / "out" / FILE)
    for name in OBSERVED:
        expected = truth(tmp_path / "out", tuned, [statistics_of(t) for t in range(2)], name, 3)
        for t in range(2):
            torch.testing.assert_close(found[f"{name}.B"][t] @ found[f"{name}.A"][t], expected[t], rtol=1e-4, atol=1e-5)


def test_an_interrupted_merge_writes_the_same_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, statistics = layers_family(tmp_path)
    given: dict[str, Any] = {"method": "esmpp", "statistics": statistics}
    pymerge.merge(base, tuned, out=tmp_path / "whole", **given)
    write = experts.write_one

    def fail(file, one, merged, device):
        if one.name == "layers.1.k_proj.weight":
            raise KeyboardInterrupt
        write(file, one, merged, device)

    monkeypatch.setattr(experts, "write_one", fail)
    with pytest.raises(Interrupted, match="stopped while the experts were written; the merged weights are kept"):
        pymerge.merge(base, tuned, out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(experts, "write_one", write)
    pymerge.merge(base, tuned, out=tmp_path / "out", **given)
    assert same(read_model(tmp_path / "out"), read_model(tmp_path / "whole"))


@pytest.mark.parametrize("method", ["esmpp", "emr"])
def test_verify_knows_the_file(tmp_path: Path, method: str) -> None:
    base, tuned, statistics = layers_family(tmp_path)
    given: dict[str, Any] = {"statistics": statistics} if method == "esmpp" else {}
    out = tmp_path / "out"
    pymerge.merge(base, tuned, method=method, out=out, **given)
    (name,) = json.loads((out / "merge.json").read_text())["side_checksums"]
    sizes = [path.stat().st_size for path in out.glob("*.safetensors")]
    assert pymerge.verify(out)["bytes"] > sum(sizes) - 2 * 4096 - 4096  # all but the header of the weights
    data = bytearray((out / name).read_bytes())
    data[-1] ^= 1
    (out / name).write_bytes(data)
    with pytest.raises(CorruptFile, match=f"1 problem.s.:\n{name}: checksum .*, written was"):
        pymerge.verify(out)
    (out / name).unlink()
    with pytest.raises(CorruptFile, match=f"{name}: missing"):
        pymerge.verify(out)


def test_the_plan_says_what_is_written(tmp_path: Path) -> None:
    base, tuned, statistics = layers_family(tmp_path)
    plan = pymerge.plan_merge(pymerge.Recipe.from_kwargs(base, tuned, "esmpp", statistics=statistics, expert_rank=70))
    assert "experts of rank 12, 24 for 8 matrices: 0.1 MB in esmpp_experts.safetensors" in plan.notes
    assert not any("fewer rows" in note for note in plan.notes)
    few = saved([statistics_of(t, MODULES) for t in range(2)], tmp_path)
    base, tuned = family(tmp_path / "few", 2, SHAPES)
    plan = pymerge.plan_merge(pymerge.Recipe.from_kwargs(base, tuned, "esmpp", statistics=few))
    assert any(
        "fewer rows of statistics than the rank of the experts: layers.0.attn.in_proj_weight" in n for n in plan.notes
    )


def test_what_cannot_be_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    base, tuned, statistics = layers_family(tmp_path)

    def refused(error: type[Exception], match: str, **given: Any) -> None:
        with pytest.raises(error, match=match):
            pymerge.merge(base, tuned, method="esmpp", out=tmp_path / "out", **given)
        assert not (tmp_path / "out").exists()

    refused(RecipeError, "esmpp needs `statistics: FILE` beside")
    refused(RecipeError, "none.stats.*: no such file", statistics=[tmp_path / "none.stats", *statistics[1:]])
    refused(InputError, "no statistics file of format 1", statistics=[base / "model.safetensors", *statistics[1:]])
    refused(
        RecipeError,
        r"no matrix gets experts: none of those with statistics .*layers\.0\.q_proj",
        statistics=statistics,
        routed="*.fc1",
    )
    refused(RecipeError, r"expert_rank: must be >= 1, got 0", statistics=statistics, expert_rank=0)
    with pytest.raises(RecipeError, match="esmpp leaves experts beside the merged model"):
        pymerge.merge(read_model(base), [read_model(m) for m in tuned], method="esmpp", statistics=statistics)
