"""Models that are observed while they are merged: the same result as observing first, and nothing else is kept."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from pymerge.engine.plan import Options
from pymerge.engine.scaled import merge_scaled, merge_update
from pymerge.errors import InputError, Interrupted, MergeError, NonFinite, OutputError, RecipeError
from tests.models import interrupted_after, read_model, same

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors.torch import save_file  # noqa: E402

from tests.engine.live_models import add_tokenizer, batch_for, children, write_texts  # noqa: E402

METHODS: dict[str, dict[str, Any]] = {
    "esm": {"method": "esm"},
    "pave + ties": {"purify": {"method": "pave", "rank_ratio": 0.8}, "method": "ties", "density": 0.5},
    "pave + ties over the model": {"purify": "pave", "method": "ties", "density": 0.5, "scope": "global"},
    "regmean": {"method": "regmean"},
}
Models = tuple[Path, list[Path]]


@pytest.fixture
def llama(tmp_path: Path) -> Models:
    return children(tmp_path, "llama")


def batches(kind: str = "llama") -> list[dict[str, torch.Tensor]]:
    return [batch_for(kind, task) for task in range(2)]


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("observe ")]


def close(one: Path, other: Path) -> None:
    a, b = read_model(one), read_model(other)
    assert a.keys() == b.keys()
    for name in a:
        assert float((a[name] - b[name]).abs().max()) <= 1e-6 * float(b[name].abs().max()), name


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "gpt2"])
def test_the_same_as_observing_first(tmp_path: Path, kind: str, name: str) -> None:
    base, tuned = children(tmp_path, kind)
    found = [pymerge.observe(path, [batch]) for path, batch in zip(tuned, batches(kind), strict=True)]
    first = pymerge.merge(base, tuned, **METHODS[name], statistics=found, out=tmp_path / "two")
    summary = pymerge.merge(base, tuned, **METHODS[name], data=batches(kind), out=tmp_path / "one")
    close(tmp_path / "one", tmp_path / "two")
    assert first["per_tensor"].keys() == summary["per_tensor"].keys()
    assert not running()


def test_samples_from_files(llama: Models, tmp_path: Path) -> None:
    base, tuned = llama
    files = [write_texts(tmp_path / f"{task}.jsonl", task) for task in range(2)]
    for path in tuned:
        add_tokenizer(path)
    given: list[Any] = [str(files[0]), {"path": str(files[1]), "samples": 3, "length": 6}]
    listed = [{"model": str(m), "data": d} for m, d in zip(tuned, given, strict=True)]
    recipe = pymerge.Recipe.from_dict({"base_model": str(base), "models": listed, "merge_method": "regmean"})
    assert pymerge.Recipe.from_yaml(recipe.to_yaml()).to_dict() == recipe.to_dict()
    assert [m["data"] for m in recipe.to_dict()["models"]] == given
    recipe.run(tmp_path / "one")
    from pymerge.statistics.samples import batches_of

    sizes: list[dict[str, Any]] = [{"samples": 32, "length": 128}, {"samples": 3, "length": 6}]
    found = [
        pymerge.observe(m, batches_of(m, f, batch_size=32, **size))
        for m, f, size in zip(tuned, files, sizes, strict=True)
    ]
    assert found[1]["model.layers.0.self_attn.q_proj"].rows == 5 + 6 + 6
    pymerge.merge(base, tuned, method="regmean", style="mergekit", statistics=found, out=tmp_path / "two")
    close(tmp_path / "one", tmp_path / "two")


def test_few_moments_are_held(llama: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pymerge.engine.feed import Feed

    base, tuned = llama
    most, release = [], Feed.release

    def counted(feed: Feed, items: Any) -> None:
        most.extend(len({id(m) for m in run.held.values()}) for run in feed.runs)
        release(feed, items)
        assert feed.plan.observed[0].held is feed.runs[0].held

    monkeypatch.setattr(Feed, "release", counted)
    plan = []
    monkeypatch.setattr(Feed, "stop", lambda feed, stop=Feed.stop: plan.append(feed) or stop(feed))
    pymerge.merge(base, tuned, method="esm", data=batches(), out=tmp_path / "out", options=Options(threads=2))
    assert 1 <= max(most) <= 2
    assert all(not run.held for run in plan[0].runs)


def test_joined_matrices(llama: Models, tmp_path: Path) -> None:
    base, tuned = llama
    found = [pymerge.observe(path, [batch]) for path, batch in zip(tuned, batches(), strict=True)]
    join = [["*.q_proj.weight", "*.k_proj.weight", "*.v_proj.weight"], ["*.gate_proj.weight", "*.up_proj.weight"]]
    pymerge.merge(base, tuned, method="esm", join=join, statistics=found, out=tmp_path / "two")
    pymerge.merge(base, tuned, method="esm", join=join, data=batches(), out=tmp_path / "one")
    close(tmp_path / "one", tmp_path / "two")
    with pytest.raises(RecipeError, match="do not share their input"):
        wrong = [["*.q_proj.weight", "*.o_proj.weight"]]
        pymerge.merge(base, tuned, method="esm", join=wrong, data=batches(), out=tmp_path / "no")
    assert not running() and not (tmp_path / "no").exists()


def test_layers_that_never_run_are_merged_without_inputs(tmp_path: Path) -> None:
    base, tuned = children(tmp_path, "bert")
    for folder in (base, *tuned):  # without the pooler's output nothing asks for the classifier
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForTokenClassification"]}))
    ran = pymerge.merge(base, tuned, method="regmean", data=batches("bert"), out=tmp_path / "one")
    found = [pymerge.observe(path, [batch]) for path, batch in zip(tuned, batches("bert"), strict=True)]
    pymerge.merge(base, tuned, method="regmean", statistics=found, out=tmp_path / "two")
    close(tmp_path / "one", tmp_path / "two")
    assert "matrices without statistics of their input: 1: bert.pooler.dense.weight" in str(ran["notes"])


def test_an_update_serves_all_scales(llama: Models, tmp_path: Path) -> None:
    base, tuned = llama
    recipe = pymerge.Recipe.from_kwargs(base, tuned, "esm", data=batches(), scale=0.3)
    once = pymerge.Recipe.from_kwargs(base, tuned, "esm", data=batches(), scale=1.0)
    merge_update(once, tmp_path / "update")
    merge_scaled(recipe, tmp_path / "update", tmp_path / "scaled")
    recipe.run(tmp_path / "merged")
    assert same(read_model(tmp_path / "scaled"), read_model(tmp_path / "merged"))


@pytest.mark.parametrize("name", ["esm", "pave + ties over the model"])
def test_an_interrupted_merge_continues_to_the_same_bytes(llama: Models, tmp_path: Path, name: str) -> None:
    base, tuned = llama
    pymerge.merge(base, tuned, **METHODS[name], data=batches(), out=tmp_path / "whole")
    with interrupted_after(9):
        pymerge.merge(base, tuned, **METHODS[name], data=batches(), out=tmp_path / "out")
    assert not running()
    with pytest.raises(OutputError, match="not this one: statistics.0..observed.digest"):
        pymerge.merge(base, tuned, **METHODS[name], data=batches()[::-1], out=tmp_path / "out")
    pymerge.merge(base, tuned, **METHODS[name], data=batches(), out=tmp_path / "out")
    assert same(read_model(tmp_path / "out"), read_model(tmp_path / "whole"))


def test_a_signal_stops_the_models(llama: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pymerge.statistics.live import Observation

    base, tuned = llama
    reached, seen = Observation.reached, []

    def interrupt(run: Observation, module: str, moments: Any) -> None:
        reached(run, module, moments)
        seen.append(module)
        if len(seen) == 7:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Observation, "reached", interrupt)
    with pytest.raises(Interrupted):
        pymerge.merge(base, tuned, method="regmean", data=batches(), out=tmp_path / "out")
    assert not running() and (tmp_path / "out.partial").exists() and len(seen) < 28
    monkeypatch.undo()
    pymerge.merge(base, tuned, method="regmean", data=batches(), out=tmp_path / "out")
    pymerge.merge(base, tuned, method="regmean", data=batches(), out=tmp_path / "whole")
    assert same(read_model(tmp_path / "out"), read_model(tmp_path / "whole"))


def test_what_goes_wrong_in_a_run_stops_the_merge(llama: Models, tmp_path: Path) -> None:
    base, tuned = llama
    weights = read_model(tuned[1])
    name = "model.layers.1.input_layernorm.weight"
    save_file(weights | {name: weights[name] * 3e38}, tuned[1] / "model.safetensors", metadata={"format": "pt"})
    message = "task1: model.layers.1.self_attn.q_proj: the input of this layer has NaN or infinite entries"
    with pytest.raises(NonFinite, match=message):
        pymerge.merge(base, tuned, method="regmean", data=batches(), relax={"nonfinite": "keep"}, out=tmp_path / "out")
    wrong = {"input_ids": torch.full((2, 3), 51)}
    with pytest.raises(InputError, match="task0: the model does not run on its samples: IndexError"):
        pymerge.merge(base, tuned, method="regmean", data=[wrong, wrong], out=tmp_path / "out")
    assert not running() and not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def refused(models: Models, data: Any, method: str = "regmean", **more: Any) -> str:
    base, tuned = models
    with pytest.raises(MergeError) as caught:
        options = more.pop("options", None)
        pymerge.plan_merge(pymerge.Recipe.from_kwargs(base, tuned, method, data=data, **more), options)
    return str(caught.value)


def test_what_is_refused_before_anything_runs(llama: Models, tmp_path: Path) -> None:
    base, tuned = llama
    text = str(write_texts(tmp_path / "x.jsonl", 0))
    found = [pymerge.observe(path, [batch]) for path, batch in zip(tuned, batches(), strict=True)]
    assert "statistics and data are given: give one of the two" in refused(llama, batches(), statistics=found)
    assert "ties does not use it" in refused(llama, batches(), "ties", weight=1.0)
    assert "no tokenizer can be loaded from this folder" in refused(llama, [text, text])
    assert "unknown key 'sample': did you mean samples" in refused(llama, [{"path": text, "sample": 3}] * 2)
    assert "samples: must be a whole number from 1, got 0" in refused(llama, [{"path": text, "samples": 0}] * 2)
    assert "absent: no such file or folder" in refused(llama, ["absent", text])
    assert "must be a path, or {path, samples, length, field}, got 3" in refused(llama, [3, 3])
    assert "cut it along dim 0" in refused(llama, batches(), split={"*.q_proj.weight": {"parts": 2, "dim": 1}})
    assert "at the models again for its masks" in refused(llama, batches(), "emr", purify="pave")
    assert "at the models again for its experts" in refused(llama, batches(), "esmpp")
    assert "not observed while they are aligned" in refused(llama, batches(), align={"method": "mudsc"})
    few = refused(llama, batches(), options=Options(memory=60_000_000))
    assert "a merge that observes its models needs" in few
    with pytest.raises(RecipeError, match="data: is for models in folders"):
        pymerge.merge(read_model(base), [read_model(p) for p in tuned], method="regmean", data=batches())
    loose = [path / "model.safetensors" for path in tuned]
    for path in tuned:
        (path / "config.json").unlink()
    assert "folders with a config.json" in refused((base, loose), batches())


def test_the_plan_says_what_it_takes(llama: Models) -> None:
    from pymerge.engine.describe import describe_plan

    base, tuned = llama
    recipe = pymerge.Recipe.from_kwargs(base, tuned, "task_arithmetic", purify="pave", data=batches())
    plan = pymerge.plan_merge(recipe)
    facts = describe_plan(plan, Options())["observing"]
    weights = sum((path / "model.safetensors").stat().st_size for path in tuned)
    assert facts["passes"] == 2 and abs(facts["bytes_read"] - 2 * weights) < 20_000
    rows, n = 4 * 9, 48
    assert facts["moments"] == 2 * 4 * (4 * n * (n + 1) // 2) and facts["states"] == 2 * 4 * rows * n * 4
