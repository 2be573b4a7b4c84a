"""Models on S3: moto's server on this machine, read by s3fs. `make test-remote` brings both."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("moto.server")
s3fs = pytest.importorskip("s3fs")

import pymerge  # noqa: E402
from pymerge.errors import ChangedInput, RecipeError  # noqa: E402
from tests.adapters import random_factors, write_adapter  # noqa: E402
from tests.models import family, random_tensors, write_model  # noqa: E402

BUCKET = "weights"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "not-to-be-shown",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    system.mkdir(BUCKET)
    yield system
    system.rm(BUCKET, recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def upload(system: Any, folder: Path) -> str:
    system.put(f"{folder}/", f"{BUCKET}/models/{folder.name}/", recursive=True)
    return f"s3://{BUCKET}/models/{folder.name}"


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in ("merge.json", "README.md")}


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "iso_c"])
def test_same_bytes_as_a_local_merge(method: str, s3: Any, tmp_path: Path) -> None:
    _, models = family(tmp_path, 2)
    base = write_model(tmp_path / "sharded", random_tensors(0), shards=3)
    adapter = write_adapter(tmp_path / "adapter", random_factors(3, {"layers.0.up.weight": (48, 32)}), base)
    (base / "tokenizer.json").write_text('{"version": "1.0"}')
    near = [str(path) for path in (base, *models, adapter)]
    far = [upload(s3, path) for path in (base, *models, adapter)]
    pymerge.merge(near[0], near[1:], method=method, out=tmp_path / "near")
    pymerge.merge(far[0], far[1:], method=method, out=tmp_path / "far")
    assert files(tmp_path / "far") == files(tmp_path / "near") and "tokenizer.json" in files(tmp_path / "far")
    told = (tmp_path / "far" / "merge.json").read_text()
    assert json.loads(told)["inputs"][0]["files"][0][2].startswith("ETag") and "not-to-be-shown" not in told


def test_another_etag_is_refused(s3: Any, tmp_path: Path) -> None:
    base, models = family(tmp_path, 1)
    recipe = pymerge.Recipe.from_kwargs(upload(s3, base), [upload(s3, models[0])], "ties")
    write_model(models[0], random_tensors(5))
    upload(s3, models[0])
    with pytest.raises(ChangedInput, match=f"s3://{BUCKET}/models/tuned0/model.safetensors: changed"):
        recipe.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("url", "settings", "said"),
    [
        ("s3://no-such-bucket/model", {}, "no such bucket"),
        (f"s3://{BUCKET}/models/none", {}, "no such bucket, folder or file"),
        (f"s3://{BUCKET}/none.safetensors", {}, "no such bucket, folder or file"),
        (f"s3://{BUCKET}/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "cannot be reached"),
        (f"s3://{BUCKET}/x", {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no credentials"),
        (f"s3://{BUCKET}/x", {"AWS_PROFILE": "nobody"}, "ProfileNotFound|no credentials"),
    ],
)
def test_what_goes_wrong_is_said_in_a_line(
    url: str, settings: dict[str, str | None], said: str, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in settings.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(RecipeError, match=f"base_model: {url}: .*({said})") as caught:
        pymerge.Recipe.from_kwargs(url, [str(write_model(tmp_path / "model", random_tensors(0)))], "ties")
    assert "not-to-be-shown" not in str(caught.value) and "Traceback" not in str(caught.value)
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.undo()


def test_memory_stays_within_the_budget(s3: Any, tmp_path: Path) -> None:
    shapes = {f"layers.{i}.up.weight": (2048, 4096) for i in range(6)}
    base, one, two = (
        upload(s3, write_model(tmp_path / name, random_tensors(i, shapes, torch.float16), shards=6))
        for i, name in enumerate(("base", "one", "two"))
    )
    given = "".join(f"  - {{model: {model}, parameters: {{weight: 0.5}}}}\n" for model in (one, two))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"merge_method: ties\nbase_model: {base}\nmodels:\n{given}")
    command = [sys.executable, "-m", "pymerge", "merge", recipe, tmp_path / "out", "--memory", "260MB", "--quiet"]
    subprocess.run(command, check=True)
    peak = json.loads((tmp_path / "out" / "merge.json").read_text())["peak_rss_bytes"]
    assert peak <= 260e6 < 3 * 6 * 2 * 2048 * 4096
