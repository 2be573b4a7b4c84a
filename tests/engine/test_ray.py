"""Merges on a real Ray cluster of three nodes on this machine, each with processes of its own; `make test-ray`.

What needs no processes to be lost is in test_shares.py."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pymerge.engine.local import merge_to_disk
from pymerge.engine.on_ray import merge_on_ray
from pymerge.engine.plan import SLACK, Options
from pymerge.errors import ClusterError, NonFinite, RecipeError
from pymerge.recipe import Recipe
from tests.models import family, read_model, write_model

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

SHAPES = {"embed.weight": (300, 64)} | {f"layers.{i}.up.weight": (96, 64 + i) for i in range(12)} | {"norm": (64,)}
SLOW = {f"layers.{i}.up.weight": (256, 256) for i in range(20)}  # half a second or so each with wudi
OPTIONS = Options(memory=SLACK + (60 << 20), threads=1, shard_bytes=100_000, progress=False)
STORE = 80 << 20  # bytes, Ray's smallest is 75 MB; nothing of a merge goes through it
COMMAND = ["--memory", "500MB", "--threads", "1", "--shard-size", "2MB", "-q"]


def add_node(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=STORE, memory=2 << 30)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that runs nothing and three nodes with a processor each."""
    head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(3):
        add_node(found)
    yield found
    ray.shutdown()
    found.shutdown()


def checksums(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("method", ["linear", "ties", "tsv_m", "pcb", "emr"])
def test_the_bytes_of_a_local_merge(cluster: Cluster, tmp_path: Path, method: str) -> None:
    base, models = family(tmp_path, 3, SHAPES)
    given = {"weight": 0.5} if method == "linear" else {}
    recipe = Recipe.from_kwargs(None if method == "linear" else base, models, method, **given)
    here = merge_to_disk(recipe, tmp_path / "here", OPTIONS)
    shared = merge_on_ray(recipe, tmp_path / "shared", OPTIONS, address=cluster.address)
    assert checksums(tmp_path / "here") == checksums(tmp_path / "shared")
    assert shared["per_tensor"] == here["per_tensor"] and shared["checksums"] == here["checksums"]


def test_errors_of_workers_arrive_as_they_are(cluster: Cluster, tmp_path: Path) -> None:
    base, models = family(tmp_path, 2, SHAPES)
    tensors = read_model(models[1])
    tensors["layers.7.up.weight"][3, 4] = float("nan")
    write_model(models[1], tensors)
    recipe, said = Recipe.from_kwargs(base, models, "task_arithmetic"), []
    for merge, how in ((merge_to_disk, {}), (merge_on_ray, {"address": cluster.address})):
        with pytest.raises(NonFinite, match=r"layers\.7\.up\.weight") as raised:
            merge(recipe, tmp_path / "out", OPTIONS, **how)
        said.append(str(raised.value))
        assert not list(tmp_path.glob("out*"))
    assert said[0] == said[1]


def test_a_cluster_that_cannot_run_it_is_refused_at_once(cluster: Cluster, tmp_path: Path) -> None:
    base, models = family(tmp_path, 2, SHAPES)
    recipe = Recipe.from_kwargs(base, models, "ties")
    for options, what in ((Options(threads=9), "9 CPUs"), (Options(threads=1, memory=9 << 30), r"1 CPUs, \d+\.\d GB")):
        with pytest.raises(RecipeError, match=f"no node of the Ray cluster has {what}.*nodes: .*1 CPUs, 2.1 GB"):
            merge_on_ray(recipe, tmp_path / "out", options, address=cluster.address)
    assert not list(tmp_path.glob("out*"))


def test_no_cluster_there(tmp_path: Path) -> None:
    code = [sys.executable, "-m", "pymerge", "merge", slow_recipe(tmp_path), tmp_path / "out", "--engine", "ray"]
    found = subprocess.run([*code, "--address", "127.0.0.1:1"], capture_output=True, text=True)
    assert found.returncode == ClusterError.exit_code and "no Ray cluster answers at 127.0.0.1:1" in found.stderr
    assert "Traceback" not in found.stderr


# losses


def slow_recipe(folder: Path) -> Path:
    base, models = family(folder, 2, SLOW)
    path = folder / "recipe.yaml"
    named = [{"model": str(model)} for model in models]
    path.write_text(yaml.safe_dump({"merge_method": "wudi", "base_model": str(base), "models": named}))
    return path


class Merge:
    """A merge by the command line, in a process of its own."""

    def __init__(self, recipe: Path, out: Path, *more: str) -> None:
        self.journal = out.with_name(f"{out.name}.partial") / "journal"
        command = [sys.executable, "-m", "pymerge", "merge", recipe, out, *COMMAND, *more]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    @property
    def written(self) -> int:
        """Segments that the journal vouches for."""
        return max(0, self.journal.read_bytes().count(b"\n") - 1) if self.journal.exists() else 0

    def reaches(self, segments: int) -> None:
        while self.written < segments:
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.02)

    def ends(self) -> tuple[int, str]:
        _, said = self.process.communicate()
        return self.process.returncode, said


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A recipe, and the files of a local merge."""
    folder = tmp_path_factory.mktemp("slow")
    recipe = slow_recipe(folder)
    assert Merge(recipe, folder / "here").ends() == (0, "")
    return recipe, checksums(folder / "here")


def test_a_node_is_lost_then_the_driver_then_it_is_resumed(cluster: Cluster, tmp_path: Path, slow: Any) -> None:
    (recipe, wanted), out = slow, tmp_path / "out"
    on_ray = ("--engine", "ray", "--address", cluster.address)
    merge = Merge(recipe, out, *on_ray)
    merge.reaches(4)
    cluster.remove_node(sorted(cluster.worker_nodes, key=str)[0], allow_graceful=False)
    merge.reaches(merge.written + 4)
    merge.process.kill()
    assert merge.ends()[0] == -signal.SIGKILL
    kept = merge.written
    assert kept >= 8 and not out.exists()
    merge = Merge(recipe, out, *on_ray)
    merge.reaches(kept + 2)  # what was kept is verified and taken over, not merged again
    cluster.remove_node(sorted(cluster.worker_nodes, key=str)[0], allow_graceful=False)  # one of three is left
    add_node(cluster)
    assert merge.ends() == (0, "")
    assert checksums(out) == wanted and not list(tmp_path.glob("out.*"))
    add_node(cluster)


@pytest.mark.parametrize("resumed_by", ["ray", "local"])
def test_ctrl_c_keeps_what_is_done(cluster: Cluster, tmp_path: Path, slow: Any, resumed_by: str) -> None:
    (recipe, wanted), out = slow, tmp_path / "out"
    on_ray = ("--engine", "ray", "--address", cluster.address)
    merge = Merge(recipe, out, *on_ray)
    merge.reaches(3)
    merge.process.send_signal(signal.SIGINT)
    code, said = merge.ends()
    assert code == 130 and "what is finished is kept: the same command continues it" in said
    assert "Traceback" not in said and 3 <= merge.written < len(SLOW) and not out.exists()
    assert Merge(recipe, out, *(on_ray if resumed_by == "ray" else ())).ends() == (0, "")
    summary = json.loads((out / "merge.json").read_text())
    assert len(summary["checksums"]) == len(SLOW)
    assert checksums(out) == wanted
