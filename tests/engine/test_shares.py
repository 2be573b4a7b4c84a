"""A merge in shares, as Ray workers do it, here one after the other in this process: the bytes of a local merge.

With processes and nodes that are lost: test_ray.py, which needs Ray."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from pymerge.checkpoint.shared import SharedOutput
from pymerge.engine.devices import BACKENDS
from pymerge.engine.execute import Executor, Stop
from pymerge.engine.local import merge_to_disk, opened_plan
from pymerge.engine.on_ray import Run, SurveyOnNodes, job_of, merge_on_ray, run_on
from pymerge.engine.plan import SLACK, Options
from pymerge.engine.progress import NoProgress
from pymerge.engine.ray_cluster import Cluster, knock, unpacked
from pymerge.engine.ray_worker import Failure
from pymerge.engine.shares import Answers, Share, cut
from pymerge.engine.survey import SweptSurvey
from pymerge.errors import ClusterError, InputError, Interrupted, MergeError, NonFinite, OutputError, RecipeError
from pymerge.ops.delta_rule import DeltaRule
from pymerge.recipe import Recipe
from tests.adapters import SHAPES as ADAPTED
from tests.adapters import random_factors, write_adapter
from tests.engine.fake_device import fake_devices
from tests.engine.observed import SHAPES as OBSERVED
from tests.engine.observed import saved, statistics_of
from tests.models import family, interrupted_after, random_tensors, read_model, write_model

SHAPES = {
    "embed.weight": (300, 40),
    **{f"layers.{i}.{kind}_proj.weight": (24, 40) for i in range(10) for kind in ("q", "k")},
    "layers.0.norm": (40,),
    "scalar": (),
    "empty": (0, 4),
}
JOIN = [["*.q_proj.weight", "*.k_proj.weight"]]
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "weight": 0.3},
    "ties": {"method": "ties", "density": 0.3, "scope": "tensor"},
    "global ties": {"method": "ties"},
    "dare": {"method": "dare_linear"},
    "tsv_m": {"method": "tsv_m", "join": JOIN},
    "svc, joined": {"method": "tsv_m", "calibrate": "svc", "join": JOIN},
    "pcb": {"method": "pcb"},
    "consensus, lines": {"method": "consensus", "threshold": [0.2, 0.4, 0.6], "calibrate": "lines"},
    "emr": {"method": "emr"},
}
PAVE = {"method": "pave", "rank_ratio": 0.7}
WITH_STATISTICS: dict[str, dict[str, Any]] = {
    "pave, global ties": {"method": "ties", "purify": PAVE},
    "pave, pcb": {"method": "pcb", "purify": PAVE},
    "pave, emr": {"method": "emr", "purify": PAVE},
    "esm": {"method": "esm"},
    "esmpp": {"method": "esmpp"},
    "regmean": {"method": "regmean"},
}
OPTIONS = Options(memory=SLACK + (20 << 20), threads=2, shard_bytes=200_000, progress=False)


class InTurn(Cluster):
    """Runs calls here; what goes to a worker and back is pickled, as it is on the way."""

    def __init__(self, before: Callable[[int], None] = lambda n: None) -> None:
        super().__init__({})
        self.before, self.sent = before, 0

    @property
    def places(self) -> int:
        return 2

    def put(self, value: Any) -> Any:
        return value

    def run(self, function: Any, calls: Sequence[Any], take: Any, check: Any) -> None:
        for n, call in enumerate(calls):
            self.before(n)
            check()
            sent = pickle.dumps((function, call))
            self.sent = max(self.sent, len(sent))
            function, call = pickle.loads(sent)
            take(n, unpacked(pickle.loads(pickle.dumps(function(*call)))))


def in_shares(recipe: Recipe, out: Path, cluster: InTurn | None = None, options: Options = OPTIONS) -> dict[str, Any]:
    return merge_to_disk(recipe, out, options, run=partial(run_on, cluster or InTurn()))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors"}


def facts(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: summary[key] for key in ("per_tensor", "checksums", "notes", "side_checksums", "tensors")}


def both(tmp_path: Path, recipe: Recipe) -> None:
    """One recipe, merged here and in shares: equal files, equal summaries."""
    here, shared = merge_to_disk(recipe, tmp_path / "here", OPTIONS), in_shares(recipe, tmp_path / "shared")
    assert files(tmp_path / "here") == files(tmp_path / "shared")
    assert facts(here) == facts(shared)
    assert pymerge.verify(tmp_path / "shared")["tensors"] == len(here["checksums"])


@pytest.mark.parametrize("setting", METHODS.values(), ids=METHODS)
def test_the_bytes_of_a_local_merge(tmp_path: Path, setting: dict[str, Any]) -> None:
    base, models = family(tmp_path, 3, SHAPES, torch.bfloat16)
    both(tmp_path, Recipe.from_kwargs(None if setting["method"] == "linear" else base, models, **setting))


def test_devices_are_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "fake", fake_devices()[1])
    base, models = family(tmp_path, 3, {f"layers.{i}.up.weight": (64, 64) for i in range(3)}, torch.bfloat16)
    recipe = Recipe.from_kwargs(base, models, "tsv_m")
    here, options = tmp_path / "here", replace(OPTIONS, memory=OPTIONS.memory_bytes + (64 << 20))
    merge_to_disk(recipe, here, options)
    summary = in_shares(recipe, tmp_path / "shared", options=replace(options, device="fake:0"))
    assert files(here) == files(tmp_path / "shared")
    assert "devices" not in summary and "busy_seconds" not in summary  # those of other machines


@pytest.mark.parametrize("setting", WITH_STATISTICS.values(), ids=WITH_STATISTICS)
def test_questions_to_all_matrices(tmp_path: Path, setting: dict[str, Any]) -> None:
    base, models = family(tmp_path, 3, OBSERVED)
    found = saved([statistics_of(i, path=path) for i, path in enumerate(models)], tmp_path)
    both(tmp_path, Recipe.from_kwargs(base, models, statistics=found, **setting))


@pytest.mark.parametrize("method", ["knots", "core_space", "task_arithmetic"])
def test_adapters(tmp_path: Path, method: str) -> None:
    base = write_model(tmp_path / "base", random_tensors(0, ADAPTED, scale=0.05))
    shapes = {name: shape for name, shape in ADAPTED.items() if "proj" in name}
    models = [write_adapter(tmp_path / f"adapter{t}", random_factors(t + 1, shapes), base) for t in range(2)]
    both(tmp_path, Recipe.from_kwargs(base, models, method))


def test_models_in_another_order_of_units(tmp_path: Path) -> None:
    """Permutations are searched for once; the workers get them."""
    shapes = {"0.weight": (16, 8), "0.bias": (16,), "2.weight": (16, 16), "2.bias": (16,), "4.weight": (3, 16)}
    models = [write_model(tmp_path / f"m{i}", random_tensors(i, shapes)) for i in range(2)]
    align = {"method": "mudsc", "spec": "chain"}
    recipe = Recipe.from_kwargs(None, models, "linear", weight=0.5, align=align)
    both(tmp_path, recipe)
    groups = json.loads((tmp_path / "shared" / "merge.json").read_text())["align"]["groups"]
    assert sum(sum(group["moved"]) for group in groups.values()) > 0


def test_slices_by_paths_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"model_type": "test", "num_hidden_layers": 3, "tie_word_embeddings": False}
    for i, name in enumerate("ab"):
        shapes = {"model.embed_tokens.weight": (9, 8), **{f"model.layers.{j}.w": (8, 8) for j in range(3)}}
        write_model(tmp_path / name, random_tensors(i, shapes), config)
    monkeypatch.chdir(tmp_path)
    slices = [
        {"sources": [{"model": "./a", "layer_range": [0, 2]}]},
        {"sources": [{"model": "./b", "layer_range": [1, 3]}]},
    ]
    both(tmp_path, Recipe.from_dict({"merge_method": "passthrough", "slices": slices}))


def test_what_is_sent_does_not_grow_with_the_models(tmp_path: Path) -> None:
    sent = []
    for width in (32, 512):
        base, models = family(tmp_path / str(width), 3, {f"layers.{i}.w": (width, 64) for i in range(4)})
        cluster = InTurn()
        in_shares(Recipe.from_kwargs(base, models, "ties", density=0.2), tmp_path / f"out{width}", cluster)
        sent.append(cluster.sent)
    assert sent[1] < sent[0] + 100 and sent[1] < 10_000


def recipe_of(tmp_path: Path, method: str = "ties") -> Recipe:
    base, models = family(tmp_path, 3, SHAPES)
    return Recipe.from_kwargs(base, models, method)


def stopping_at(number: int, error: BaseException) -> Callable[[int], None]:
    def before(n: int) -> None:
        if n == number:
            raise error

    return before


@pytest.mark.parametrize("method", ["ties", "tsv_m", "consensus"])
def test_begun_in_shares_and_finished_here_and_the_other_way_round(tmp_path: Path, method: str) -> None:
    recipe = recipe_of(tmp_path, method)
    merge_to_disk(recipe, tmp_path / "whole", OPTIONS)
    whole = files(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):  # as if the driver had been killed
        in_shares(recipe, tmp_path / "out", InTurn(stopping_at(3, KeyboardInterrupt())))
    journal = (tmp_path / "out.partial" / "journal").read_bytes()
    assert journal.count(b"\n") > 1 or method != "tsv_m"  # the others were stopped while they asked
    merge_to_disk(recipe, tmp_path / "out", OPTIONS)
    assert files(tmp_path / "out") == whole
    with interrupted_after(4):
        merge_to_disk(recipe, tmp_path / "again", OPTIONS)
    in_shares(recipe, tmp_path / "again")
    assert files(tmp_path / "again") == whole


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, written = recipe_of(tmp_path, "tsv_m"), []
    with pytest.raises(KeyboardInterrupt):
        in_shares(recipe, tmp_path / "out", InTurn(stopping_at(4, KeyboardInterrupt())))
    before = (tmp_path / "out.partial" / "journal").read_bytes().count(b"\n") - 1
    write = Executor.write
    monkeypatch.setattr(Executor, "write", lambda self, s: (written.append(s.name), write(self, s))[1])
    summary = in_shares(recipe, tmp_path / "out")
    assert before > 0 and before + len(written) == len(summary["checksums"]) - 1  # "empty" has no bytes


def test_bytes_that_nobody_vouches_for_are_written_again(tmp_path: Path) -> None:
    """A worker that is lost leaves torn tiles; the driver hears nothing of them."""
    recipe = recipe_of(tmp_path, "tsv_m")
    merge_to_disk(recipe, tmp_path / "whole", OPTIONS)

    class Lossy(InTurn):
        def run(self, function: Any, calls: Sequence[Any], take: Any, check: Any) -> None:
            for call in calls[::2]:  # done, and torn behind the worker's back: nothing is taken
                for segment in function(*call):
                    slot = plan.layout.slots[segment.name]
                    path = tmp_path / "out.partial" / plan.layout.shards[slot.shard].file
                    with open(path, "r+b") as file:
                        file.seek(slot.offset + segment.start + segment.nbytes // 2)
                        file.write(b"\xff" * (segment.nbytes - segment.nbytes // 2))
            super().run(function, calls, take, check)

    with opened_plan(recipe, OPTIONS) as (_, plan):
        in_shares(recipe, tmp_path / "out", Lossy())
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_signal_keeps_what_is_finished(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "tsv_m")
    merge_to_disk(recipe, tmp_path / "whole", OPTIONS)
    with pytest.raises(Interrupted, match="stopped by signal 2; what is finished is kept") as raised:
        in_shares(recipe, tmp_path / "out", InTurn(lambda n: os.kill(os.getpid(), signal.SIGINT) if n == 3 else None))
    assert raised.value.exit_code == 130 and (tmp_path / "out.partial" / "journal").exists()
    in_shares(recipe, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_worker_that_is_stopped_returns_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray cancels by a SIGINT in the worker; nodes that are shut down send SIGTERM. The rest goes round again."""
    recipe, start, started = recipe_of(tmp_path, "tsv_m"), Executor.start, []
    merge_to_disk(recipe, tmp_path / "whole", OPTIONS)

    def stopped(self: Executor, batch: Any) -> None:
        started.append(batch)
        if len(started) in (2, 5, 8):
            os.kill(os.getpid(), signal.SIGTERM)
        start(self, batch)

    monkeypatch.setattr(Executor, "start", stopped)
    in_shares(recipe, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_workers_that_are_stopped_again_and_again(tmp_path: Path) -> None:
    class Stopped(InTurn):
        def run(self, function: Any, calls: Sequence[Any], take: Any, check: Any) -> None:
            for n, _ in enumerate(calls):
                take(n, [])

    with pytest.raises(ClusterError, match="stopped again and again; what is finished is kept"):
        in_shares(recipe_of(tmp_path, "tsv_m"), tmp_path / "out", Stopped())
    assert (tmp_path / "out.partial" / "journal").exists()


# errors


def test_an_error_in_a_worker_is_that_of_a_local_merge(tmp_path: Path) -> None:
    base, models = family(tmp_path, 2, SHAPES)
    tensors = read_model(models[1])
    tensors["layers.2.k_proj.weight"][3, 4] = float("nan")
    write_model(models[1], tensors)
    recipe = Recipe.from_kwargs(base, models, "task_arithmetic")
    said = []
    for merge in (merge_to_disk, in_shares):
        with pytest.raises(NonFinite, match="layers.2.k_proj.weight") as raised:
            merge(recipe, tmp_path / "out")
        said.append((str(raised.value), raised.value.exit_code))
        assert not list(tmp_path.glob("out*"))
    assert said[0] == said[1]


def test_a_read_error_of_a_worker_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, read, calls = recipe_of(tmp_path), os.preadv, []

    def failing(*given: Any) -> int:
        calls.append(1)
        if len(calls) > 80:
            raise OSError(errno.EIO, "Input/output error")
        return read(*given)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        with pytest.raises(InputError, match="Input/output error"):
            in_shares(recipe, tmp_path / "out")
    assert (tmp_path / "out.partial" / "journal").exists()
    in_shares(recipe, tmp_path / "out")


def test_a_full_disk_at_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path)
    with monkeypatch.context() as patch:

        def full(self: Any, view: memoryview, offset: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr("pymerge.checkpoint.shard_file.ShardFile.write", full)
        with pytest.raises(OutputError, match="the disk is full") as raised:
            in_shares(recipe, tmp_path / "out")
    assert raised.value.exit_code == 5 and not list(tmp_path.glob("out*"))


def test_a_node_that_lacks_a_model_says_so(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    model = Path(recipe.models[1].path)
    gone = InTurn(lambda n: model.rename(tmp_path / "gone") if model.exists() else None)
    with pytest.raises(InputError, match=r"on .*tuned1.*(no such file|not found|does not exist)"):
        in_shares(recipe, tmp_path / "out", gone)


def test_a_node_with_other_models_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    touched = InTurn(lambda n: os.utime(Path(recipe.models[1].path) / "model.safetensors", ns=(1, 1)))
    with pytest.raises(MergeError, match=r"sees another merge than .*: model.safetensors has changed .*same files"):
        in_shares(recipe, tmp_path / "out", touched)


def test_a_node_that_does_not_see_the_output_is_refused(tmp_path: Path) -> None:
    staging, elsewhere = tmp_path / "out.partial", tmp_path / "elsewhere"
    hidden = InTurn(lambda n: staging.rename(elsewhere) if staging.exists() else None)
    with pytest.raises(OutputError, match="does not see the output .* file system that all machines share"):
        in_shares(recipe_of(tmp_path), tmp_path / "out", hidden)


def test_the_output_of_another_merge_is_not_written_into(tmp_path: Path) -> None:
    base, models = family(tmp_path, 2, SHAPES)
    with pytest.raises(KeyboardInterrupt):
        in_shares(
            Recipe.from_kwargs(base, models, "ties"), tmp_path / "out", InTurn(stopping_at(0, KeyboardInterrupt()))
        )
    with opened_plan(Recipe.from_kwargs(base, models, "ties"), OPTIONS) as (_, plan):
        with pytest.raises(OutputError, match="does not see the output"):
            SharedOutput(tmp_path / "out.partial", plan.layout, {"recipe": "another"})


def test_what_runs_in_one_process_only_is_refused_at_once(tmp_path: Path) -> None:
    base, models = family(tmp_path, 2)
    state = [read_model(model) for model in models]
    (tmp_path / "samples.jsonl").write_text('{"input_ids": [1, 2]}\n')
    data = [tmp_path / "samples.jsonl"] * 2
    for recipe, options, said in [
        (Recipe.from_kwargs(None, state, "linear", weight=0.5), OPTIONS, "in memory"),
        (Recipe.from_kwargs(base, models, "regmean", data=data), OPTIONS, "statistics. in place of data"),
        (Recipe.from_kwargs(base, models, "ties"), Options(device="cuda:1"), "Ray says which GPU"),
    ]:
        with pytest.raises(RecipeError, match=said):
            merge_on_ray(recipe, tmp_path / "out", options)
    assert not list(tmp_path.glob("out*"))


# the pieces


def test_shares_hold_everything_once_and_joined_matrices_together(tmp_path: Path) -> None:
    base, models = family(tmp_path, 3, SHAPES)
    with opened_plan(Recipe.from_kwargs(base, models, "tsv_m", join=JOIN), OPTIONS) as (_, plan):
        for places in (1, 3, 100):
            shares = cut(plan.items, lambda item: float(item.count), places)
            assert sorted(n for share in shares for n in share) == list(range(len(plan.items)))
            where = {
                plan.items[n].entry.join[0]: i for i, s in enumerate(shares) for n in s if plan.items[n].entry.join
            }
            for i, share in enumerate(shares):
                assert all(where[plan.items[n].entry.join[0]] == i for n in share if plan.items[n].entry.join)
        assert len(cut(plan.items, lambda item: float(item.count), 100)) > 4
        assert len(cut(plan.items, lambda item: 11.0, 1)) == len(cut(plan.items, lambda item: 1.0, 100))


@pytest.mark.parametrize("ranks", [(1, 1), (3000, 5000), (50_000, 1)])
@pytest.mark.parametrize("keep_ties", [False, True])
def test_a_survey_in_shares_finds_what_a_sweep_finds(tmp_path: Path, ranks: tuple[int, int], keep_ties: bool) -> None:
    """Updates of few distinct values, so that thresholds are met by many entries of several tensors."""
    shapes = {f"layers.{i}.w": (60 + i, 100) for i in range(6)} | {"embed": (200, 100)}
    base = random_tensors(0, shapes)
    updates = [{n: torch.randint(-3, 4, t.shape).float() for n, t in base.items()} for _ in range(2)]
    models = [
        write_model(tmp_path / f"m{i}", {n: t.round() + u[n] for n, t in base.items()}) for i, u in enumerate(updates)
    ]
    write_model(tmp_path / "base", {n: t.round() for n, t in base.items()})
    recipe = Recipe.from_kwargs(tmp_path / "base", models, "ties")
    options = Options(memory=SLACK + (200 << 20), threads=2)
    found: dict[str, Any] = {}

    def survey(plan: Any, inputs: Any, staged: Any, options: Options) -> Any:
        items = plan.surveys[0][1]
        rule = DeltaRule(weights=(1.0, 1.0))

        def answers(one: SweptSurvey) -> list[Any]:
            return [one.kth(ranks, rule, keep_ties), one.gram(), one.l1(rule), one.signs(rule)]

        how = {"threads": 2, "progress": NoProgress(), "stop": Stop()}
        here = Share(plan, staged, answers=Answers(), question=lambda e: answers(e.survey(items)), **how)
        here.run()
        found["here"] = here.found
        shared = SurveyOnNodes(Run(InTurn(), job_of(plan, inputs, staged, options), here, 2), 0, items)
        assert len(shared.shares) > 3
        found["shared"] = answers(shared)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_to_disk(recipe, tmp_path / "out", options, run=survey)
    assert found["here"] == found["shared"]
    if ranks == (3000, 5000) and not keep_ties:
        index = array("q", found["here"][0].index)
        assert 0 < index[0] < 20_000  # a threshold with ties was really split


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = family(tmp_path, 2)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RecipeError, match=r"^the engine ray needs Ray: pip install 'pymerge\[ray\]'$"):
        pymerge.merge(base, models, method="ties", out=tmp_path / "out", engine="ray")
    with pytest.raises(RecipeError, match="the engine ray merges folders into a whole model"):
        pymerge.merge(read_model(base), [read_model(m) for m in models], method="ties", engine="ray")
    with pytest.raises(RecipeError, match="the engine ray merges folders into a whole model"):
        pymerge.merge(base, models, method="ties", out=tmp_path / "out", engine="ray", as_adapter=4)


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "http://head:1/x"])
def test_addresses_that_no_cluster_can_have(address: str) -> None:
    with pytest.raises(RecipeError, match="must be auto or HOST:PORT"):
        knock(address)


def test_a_failure_can_be_sent() -> None:
    sent = pickle.loads(pickle.dumps(Failure(NonFinite("x: 1 NaN"), OSError(errno.EIO, "no"))))
    assert isinstance(sent.error, NonFinite) and str(sent.error) == "x: 1 NaN" and sent.cause.errno == errno.EIO
