"""Models at remote paths: the same bytes as from local ones, each byte once, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch

fsspec = pytest.importorskip("fsspec")

import pymerge  # noqa: E402
from pymerge import Options, hub  # noqa: E402
from pymerge.checkpoint import open_checkpoint  # noqa: E402
from pymerge.checkpoint.sidefiles import COPIED  # noqa: E402
from pymerge.errors import (  # noqa: E402
    ChangedInput,
    InputError,
    Interrupted,
    MergeError,
    OutputError,
    RecipeError,
    UnsafeFile,
    UnsafePath,
)
from pymerge.recipe import Recipe  # noqa: E402
from pymerge.remote import blocks, mirror, urls  # noqa: E402
from pymerge.remote.mirror import local_of, shown  # noqa: E402
from tests.adapters import random_factors, write_adapter  # noqa: E402
from tests.checkpoint.raw import write_raw, write_sharded, write_tensors  # noqa: E402
from tests.checkpoint.remote import ROOT, FarFileSystem, clear, register, upload, weight_bytes_read  # noqa: E402
from tests.components import flat, random_model, tuned_model, write_pipeline  # noqa: E402
from tests.engine.observed import SHAPES as OBSERVED_SHAPES  # noqa: E402
from tests.engine.observed import saved, statistics_of  # noqa: E402
from tests.hub_cache import cache_model  # noqa: E402
from tests.models import family, interrupted_after, random_tensors, same, tuned_from, write_model  # noqa: E402

SHAPES = {f"layers.{i}.up.weight": (256, 512) for i in range(4)} | {"norm": (512,), "layers.0.up.bias": (256,)}
BLOCK = 1 << 16


@pytest.fixture(autouse=True)
def far(monkeypatch):
    register()
    clear()
    monkeypatch.setattr(urls, "BACKOFF", 0.001)
    yield
    clear()
    blocks.BLOCKS.plan(blocks.USUAL, 1)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "LARGEST_BLOCK", BLOCK)


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a merged model but what tells of the merge itself."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if name not in ("merge.json", "README.md")}


def merge_far(tmp_path: Path, base: Path, models: list[Path], **options: Any) -> dict[str, bytes]:
    """A merge of copies of local models; checks it against that of the models themselves."""
    options = {"method": "task_arithmetic"} | options
    pymerge.merge(str(base), [str(m) for m in models], out=tmp_path / "near", **options)
    pymerge.merge(upload(base), [upload(m) for m in models], out=tmp_path / "far", **options)
    assert files(tmp_path / "far") == files(tmp_path / "near")
    return files(tmp_path / "far")


@pytest.mark.parametrize("method", ["linear", "ties", "tsv_m", "slerp"])
def test_same_bytes_as_a_local_merge(method: str, tmp_path: Path) -> None:
    base, (one, two) = family(tmp_path, 2, SHAPES)
    write_model(tmp_path / "sharded", random_tensors(0, SHAPES), shards=3)
    for name in ("tokenizer.json", "LICENSE", "optimizer.pt", "additional_chat_templates/tool.jinja"):
        (tmp_path / "sharded" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "sharded" / name).write_text("{}")
    given = [one, two] if method != "slerp" else [one]
    first, others = (None, [tmp_path / "sharded", *given]) if method == "linear" else (tmp_path / "sharded", given)
    parameters: dict[str, Any] = {"t": 0.3} if method == "slerp" else {}
    for out, where in (("near", str), ("far", upload)):
        pymerge.merge(
            where(first) if first else None,
            [where(m) for m in others],
            method=method,
            out=tmp_path / out,
            options=Options(memory=200_000_000),
            **parameters,
        )
    assert files(tmp_path / "far") == files(tmp_path / "near")
    assert {"tokenizer.json", "LICENSE", "additional_chat_templates/tool.jinja"} <= set(files(tmp_path / "far"))
    summary = json.loads((tmp_path / "far" / "merge.json").read_text())
    assert summary["inputs"][0]["path"] == f"{ROOT}/sharded" and "resolved" not in summary
    assert "/pymerge-remote-" not in json.dumps(summary)
    assert any("inputs read over the network" in note for note in summary["notes"])


def test_components_of_a_pipeline(tmp_path: Path) -> None:
    model = random_model(0)
    base = write_pipeline(tmp_path / "base", model)
    merged = merge_far(tmp_path, base, [write_pipeline(tmp_path / "tuned", tuned_model(model, 7))])
    assert "scheduler/scheduler_config.json" in merged and len(flat(model)) == len(
        [n for p in merged if p.endswith(".safetensors") for n in open_checkpoint(tmp_path / "far" / p)]
    )


def test_each_byte_of_the_weights_is_fetched_once(tmp_path: Path, small_blocks: None) -> None:
    base, models = family(tmp_path, 3, SHAPES)
    merge_far(tmp_path, base, models)
    for path in (base, *models):
        file = path / "model.safetensors"
        origin = 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
        counts = weight_bytes_read(f"{path.name}/model.safetensors", origin)
        assert len(counts) == file.stat().st_size - origin and set(counts.values()) == {1}
    longest = max(end - begin for name, begin, end in FarFileSystem.reads if name.endswith(".safetensors"))
    assert longest == BLOCK


def test_only_what_is_merged_is_fetched(tmp_path: Path, small_blocks: None) -> None:
    shapes = {f"layers.{i}.up.weight": (512, 1024) for i in range(4)}
    model = write_model(tmp_path / "model", random_tensors(0, shapes))
    with open_checkpoint(upload(model)) as checkpoint:
        tensor = checkpoint["layers.2.up.weight"]
        assert torch.equal(tensor.load(), random_tensors(0, shapes)["layers.2.up.weight"])
    weights = sum(end - begin for name, begin, end in FarFileSystem.reads if name.endswith(".safetensors"))
    assert tensor.nbytes <= weights < tensor.nbytes + 3 * BLOCK


def test_requests_are_made_side_by_side(tmp_path: Path, small_blocks: None) -> None:
    model = upload(write_model(tmp_path / "model", random_tensors(0, {"w": (2048, 512)})))
    gate = threading.Barrier(4, timeout=30)  # passed by four requests at once, or never

    def wait(path: str, start: int, data: bytes) -> bytes:
        if path.endswith(".safetensors") and BLOCK <= start < 5 * BLOCK:
            gate.wait()
        return data

    with open_checkpoint(model) as checkpoint:
        FarFileSystem.spoil = wait
        assert torch.equal(checkpoint["w"].load(), random_tensors(0, {"w": (2048, 512)})["w"])


def test_blocks_stay_within_their_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    started = blocks.Blocks.started

    def counted(self, source, begin, size):
        held.append(sum(block.end - block.begin for block in self.held.values()))
        return started(self, source, begin, size)

    monkeypatch.setattr(blocks.Blocks, "started", counted)
    tensors = random_tensors(0, {"w": (4096, 1024)})
    limit = 4 << 20
    blocks.BLOCKS.plan(limit, 2)
    with open_checkpoint(upload(write_model(tmp_path / "model", tensors))) as checkpoint:
        assert torch.equal(checkpoint["w"].load(), tensors["w"])
    assert tensors["w"].nbytes > 2 * limit and BLOCK < max(held) + blocks.BLOCKS.size * (1 + blocks.REQUESTS) <= limit


def fails(times: int, how: Any) -> None:
    """The first requests for weights of each place fail."""
    seen: dict[tuple[str, int], int] = {}

    def spoil(path: str, start: int, data: bytes) -> bytes:
        seen[path, start] = seen.get((path, start), 0) + 1
        if not path.endswith(".safetensors") or seen[path, start] > times:
            return data
        if isinstance(how, Exception):
            raise how
        return data[:how]

    FarFileSystem.spoil = spoil


@pytest.mark.parametrize("how", [ConnectionResetError("reset"), TimeoutError("slow"), OSError("503"), 5])
def test_failures_that_pass(how: Any, tmp_path: Path) -> None:
    base, models = family(tmp_path, 2)
    fails(2, how)
    merge_far(tmp_path, base, models)


def test_a_failure_that_stays_keeps_what_is_done_and_resumes(tmp_path: Path, small_blocks: None) -> None:
    base, models = family(tmp_path, 2, SHAPES)
    far = [upload(path) for path in (base, *models)]

    def broken(path: str, start: int, data: bytes) -> bytes:
        if path.endswith(".safetensors") and start > 16 * BLOCK:
            raise ConnectionResetError("reset by peer")
        return data

    options = {"method": "ties", "out": tmp_path / "far", "options": Options(memory=80_000_000)}
    FarFileSystem.spoil = broken
    with pytest.raises(InputError, match=r"far://bucket/base/model.safetensors: cannot be reached .*reset by peer"):
        pymerge.merge(far[0], far[1:], **options)
    assert (tmp_path / "far.partial").is_dir()
    FarFileSystem.spoil = None
    pymerge.merge(far[0], far[1:], **options)
    pymerge.merge(str(base), [str(m) for m in models], method="ties", out=tmp_path / "near")
    assert files(tmp_path / "far") == files(tmp_path / "near")


def test_an_interrupted_merge_resumes(tmp_path: Path) -> None:
    base, models = family(tmp_path, 2, SHAPES)
    far = [upload(path) for path in (base, *models)]
    with interrupted_after(2):
        pymerge.merge(far[0], far[1:], method="ties", out=tmp_path / "far")
    mirror._mirrors.clear()  # as in another process
    FarFileSystem.reads.clear()
    pymerge.merge(far[0], far[1:], method="ties", out=tmp_path / "far")
    pymerge.merge(str(base), [str(m) for m in models], method="ties", out=tmp_path / "near")
    assert files(tmp_path / "far") == files(tmp_path / "near")


def test_ctrl_c_does_not_wait_for_the_network(tmp_path: Path) -> None:
    base, models = family(tmp_path, 2, SHAPES)
    far = [upload(path) for path in (base, *models)]
    recipe, silent = pymerge.Recipe.from_kwargs(far[0], far[1:], "ties"), threading.Event()

    def hang(path: str, start: int, data: bytes) -> bytes:
        os.kill(os.getpid(), signal.SIGINT)
        silent.wait(60)
        return data

    FarFileSystem.spoil = hang
    with pytest.raises(Interrupted, match="the same command continues"):
        recipe.run(tmp_path / "far")
    FarFileSystem.spoil = None
    assert not silent.is_set() and (tmp_path / "far.partial").is_dir()
    silent.set()
    recipe.run(tmp_path / "far")
    pymerge.merge(str(base), [str(m) for m in models], method="ties", out=tmp_path / "near")
    assert files(tmp_path / "far") == files(tmp_path / "near")


@pytest.mark.parametrize("how", ["other", "shorter", "gone"])
def test_an_object_that_changes_is_refused(how: str, tmp_path: Path) -> None:
    base, models = family(tmp_path, 2)
    far = [upload(path) for path in (base, *models)]
    key, data = "/bucket/tuned0/model.safetensors", (models[0] / "model.safetensors").read_bytes()

    def change(path: str, start: int, found: bytes) -> bytes:
        FarFileSystem.spoil = None
        if how == "gone":
            FarFileSystem().rm_file(key)
        else:
            FarFileSystem().pipe_file(key, data[: len(data) if how == "other" else -9])
        return found

    recipe = pymerge.Recipe.from_kwargs(far[0], far[1:], "task_arithmetic")
    FarFileSystem.spoil = change
    with pytest.raises(ChangedInput, match="far:/" + key):
        recipe.run(tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_permission_is_not_asked_twice(tmp_path: Path) -> None:
    base, models = family(tmp_path, 1)
    far = [upload(path) for path in (base, *models)]
    recipe = pymerge.Recipe.from_kwargs(far[0], far[1:], "task_arithmetic")
    FarFileSystem.reads.clear()
    fails(1, PermissionError("Access Denied"))
    with pytest.raises(InputError, match="permission denied .Access Denied.*Credentials come from"):
        recipe.run(tmp_path / "out")
    assert len(FarFileSystem.reads) == len(set(FarFileSystem.reads))


def test_what_stood_still_is_found_again_and_what_changed_is_new(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", random_tensors(0))
    url = upload(model)
    first = local_of(url)
    assert local_of(url + "/") == first and shown(f"{first}/config.json") == f"{url}/config.json"
    (model / "config.json").write_text("{}")
    upload(model)
    assert (second := local_of(url)) != first and Path(second, "config.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["loose.safetensors", "model.safetensors", "model.safetensors.index.json"])
def test_single_files(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", random_tensors(0), shards=2 if name.endswith("json") else 1)
    if name == "loose.safetensors":
        (model / "model.safetensors").rename(model / name)
    with open_checkpoint(f"{upload(model)}/{name}") as there, open_checkpoint(model / name) as here:
        assert there.file_order() == here.file_order() and there.config == here.config
        assert same({n: there[n].load() for n in there}, {n: here[n].load() for n in here})


@pytest.mark.parametrize("form", ["{0}+{1}", "{1}", "near/base+{1}", "{0}+near/lo+ra"])
def test_adapters(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shapes = {"layers.0.up.weight": (48, 32)}
    near, tensors = tmp_path / "near", random_tensors(0)
    base = write_model(near / "base", tensors)
    adapter = write_adapter(near / "lo+ra", random_factors(3, shapes), base)
    reference = form.format(upload(base), upload(adapter))
    under = "near/base" if form.startswith("near") else upload(base)
    pymerge.merge(under, [reference], method="task_arithmetic", out=tmp_path / "far")
    pymerge.merge(str(base), [f"{base}+{adapter}"], method="task_arithmetic", out=tmp_path / "local")
    assert files(tmp_path / "far") == files(tmp_path / "local")


def test_the_base_of_adapters_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LARGEST_BLOCK", 4 * BLOCK)  # the base has more of them than are held
    shapes = {f"layers.{i:02}.up.weight": (256, 512) for i in range(16)}
    base = write_model(tmp_path / "base", random_tensors(0, shapes))
    adapters = [write_adapter(tmp_path / f"lora{i}", random_factors(i, shapes), base) for i in range(3)]
    merge_far(tmp_path, base, adapters, method="dare_linear", density=0.5)
    requests = Counter(begin for name, begin, _ in FarFileSystem.reads if name.endswith("base/model.safetensors"))
    assert len(requests) > 32 and set(requests.values()) == {1}


def test_files_beside_the_models(tmp_path: Path) -> None:
    base, (one, two) = family(tmp_path, 2)
    for path in (one, two):
        fisher = {name: t.abs() + 0.1 for name, t in random_tensors(len(path.name)).items()}
        write_model(tmp_path / f"fisher-{path.name}", fisher)
    weights = [upload(tmp_path / f"fisher-{path.name}") + "/model.safetensors" for path in (one, two)]
    pymerge.merge(None, [upload(one), upload(two)], method="fisher", fisher=weights, out=tmp_path / "far")
    local = [str(tmp_path / f"fisher-{path.name}") for path in (one, two)]
    pymerge.merge(None, [str(one), str(two)], method="fisher", fisher=local, out=tmp_path / "near")
    assert files(tmp_path / "far") == files(tmp_path / "near")


def test_statistics(tmp_path: Path) -> None:
    base, models = family(tmp_path, 2, OBSERVED_SHAPES)
    given = saved([statistics_of(i, path=model) for i, model in enumerate(models)], tmp_path)
    for out, where in (("near", str), ("far", upload)):
        found = [where(path) for path in given]
        pymerge.merge(where(base), [where(m) for m in models], method="regmean", statistics=found, out=tmp_path / out)
    assert files(tmp_path / "far") == files(tmp_path / "near")


def test_the_local_file_system_of_fsspec(tmp_path: Path) -> None:
    base, models = family(tmp_path, 2, SHAPES)
    pymerge.merge(f"distant://{base}", [f"distant://{m}" for m in models], method="ties", out=tmp_path / "far")
    pymerge.merge(str(base), [str(m) for m in models], method="ties", out=tmp_path / "near")
    assert files(tmp_path / "far") == files(tmp_path / "near")


def test_file_urls_are_paths(tmp_path: Path) -> None:
    base, models = family(tmp_path, 1)
    assert local_of(f"file://{base}") == str(base)
    with pytest.raises(OutputError, match="inside"):
        pymerge.merge(f"file://{base}", [f"file://{models[0]}"], method="ties", out=base / "out")


def test_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    model = write_model(tmp_path / "model", random_tensors(0))
    found = cache_model(tmp_path / "cache", "org/model", model)
    with hub.access(tmp_path / "cache"):
        assert local_of("hf://org/model") == str(found)
        assert local_of("hf://org/model@main/") == str(found)
        for wrong in ("hf://org/none", "hf://org/model/sub"):
            with pytest.raises(InputError, match=f"{wrong}: .*--download"):
                local_of(wrong)
        with pytest.raises(InputError, match="must be hf://OWNER/NAME"):
            local_of("hf://../x")
    monkeypatch.setattr(mirror, "file_system", lambda url: (FarFileSystem(), "/bucket/model"))
    upload(model)
    with hub.access(tmp_path / "cache", download=True):
        assert shown(local_of("hf://org/model")) == "hf://org/model"


def refused(reference: str, *, models: list[str] | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        pymerge.Recipe.from_kwargs(reference, models or [reference], "task_arithmetic")
    return str(caught.value)


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("far://bucket/none", "far://bucket/none: no such bucket, folder or file"),
        ("nothing://x/y", "nothing://x/y: Protocol not known"),
        ("https://user:secret@host/m", "must hold no password"),
        ("https://host/m?X-Amz-Signature=secret", "must hold no password"),
        ("https://secret@host/m", "must hold no password"),
        ("simplecache::https://host/m?X-Amz-Signature=secret", "must hold no password"),
    ],
)
def test_urls_that_lead_nowhere(reference: str, said: str) -> None:
    message = refused(reference)
    assert said in message and "secret" not in message


@pytest.mark.parametrize(("url", "package"), [("s3://b/m", "pymerge[remote]"), ("gs://b/m", "gcsfs")])
def test_a_missing_package_is_named(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: Any, **options: Any) -> None:
        raise ImportError("Install it")

    monkeypatch.setattr("fsspec.core.url_to_fs", absent)
    assert package in refused(url) and "pip install" in refused(url)


def test_pickles_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    torch.save(random_tensors(0), model / "pytorch_model.bin")
    for url in (upload(model), f"{ROOT}/model/pytorch_model.bin"):
        with pytest.raises(UnsafeFile, match="local files only"):
            open_checkpoint(url, allow_pickle=True)


def test_an_index_stays_inside_its_folder(tmp_path: Path) -> None:
    url = upload(write_sharded(tmp_path / "model", {"a.safetensors": {"w": b"abcd"}}))
    upload(write_tensors(tmp_path / "other.safetensors", {"w": b"abcd"}))
    for name, error in (("../other.safetensors", UnsafePath), ("far://bucket/other.safetensors", UnsafePath)):
        index = json.dumps({"weight_map": {"w": name}}).encode()
        FarFileSystem().pipe_file("/bucket/model/model.safetensors.index.json", index)
        with pytest.raises(error, match="far://bucket/model/model.safetensors.index.json"):
            open_checkpoint(url)
    assert not [path for path, begin, _ in FarFileSystem.reads if path.endswith("other.safetensors")]


@pytest.mark.parametrize("name", ["..", "x" * 300, "a\0b"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(write_model(tmp_path / "model", random_tensors(0)))
    listed = [{"name": f"/bucket/model/{name}", "type": "file", "size": 4}]
    monkeypatch.setattr(FarFileSystem, "ls", lambda self, path, detail=True, **options: listed)
    with pytest.raises(UnsafePath, match="no name of a file"):
        local_of(f"{ROOT}/model")


def test_sizes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "model", random_tensors(0))
    (model / "tokenizer.json").write_text(" " * 2000)
    monkeypatch.setattr(mirror, "MAX_SMALL", 1000)
    with pytest.raises(InputError, match=r"tokenizer.json: 2000 bytes; more than 1000"):
        local_of(upload(model))
    assert not [path for path, *_ in FarFileSystem.reads]
    monkeypatch.setattr(mirror, "MAX_SMALL", 10_000)
    monkeypatch.setattr(mirror, "MAX_ALL", 1500)
    with pytest.raises(InputError, match="more than 1500 bytes of files"):
        local_of(f"{ROOT}/model")
    monkeypatch.setattr(mirror, "MAX_FILES", 2)
    with pytest.raises(InputError, match="more than 2 files"):
        local_of(f"{ROOT}/model")


@pytest.mark.parametrize("raw", [b"", b"1234567", struct.pack("<Q", 1 << 62), b"version https://git-lfs.github.com/x"])
def test_damaged_weights_are_refused_as_local_ones_are(raw: bytes, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", random_tensors(0))
    (model / "model.safetensors").write_bytes(raw)
    with pytest.raises(MergeError) as here:
        open_checkpoint(model)
    with pytest.raises(MergeError) as there:
        open_checkpoint(upload(model))
    assert type(here.value) is type(there.value)
    assert str(there.value) == str(here.value).replace(str(model), f"{ROOT}/model")


def test_a_long_header_is_read_when_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pymerge.remote.files.MAX_HEAD", 16)
    tensors = random_tensors(0)
    with open_checkpoint(upload(write_model(tmp_path / "model", tensors))) as checkpoint:
        assert same({n: checkpoint[n].load() for n in checkpoint}, tensors)


def test_empty_tensors_and_headers_alone(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_raw(model / "model.safetensors", {}, b"")
    with open_checkpoint(upload(model)) as checkpoint:
        assert len(checkpoint) == 0


def test_output_and_samples_are_local(tmp_path: Path) -> None:
    base, models = family(tmp_path, 1)
    assert "taken a slash" in refused(str(Path("s3://bucket/model")))
    for out in ("s3://bucket/out", Path("s3://bucket/out")):
        with pytest.raises(OutputError, match="written to local folders"):
            pymerge.merge(str(base), [str(models[0])], method="ties", out=out)
    raw = {
        "merge_method": "regmean",
        "models": [{"model": str(m), "data": "s3://b/x.jsonl"} for m in (base, models[0])],
    }
    with pytest.raises(RecipeError, match="samples are read from local files"):
        Recipe.from_dict(raw)
    assert not os.path.exists("s3:")


def test_small_files_hold_all_that_is_copied() -> None:
    named = [pattern.replace("*", "x") for pattern in COPIED]
    assert [name for name in named if not any(fnmatchcase(name, pattern) for pattern in mirror.SMALL)] == []


def test_stand_ins_are_removed_with_the_process(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tuned_from(random_tensors(0), 1))
    code = (
        "from tests.checkpoint.remote import *; from pathlib import Path; register();"
        f"from pymerge.remote.mirror import local_of; print(local_of(upload(Path({str(model)!r}))))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pymerge-remote-" in run.stdout and not os.path.exists(run.stdout.strip())
    shutil.rmtree(model)


def test_a_recipe_that_is_sent_to_another_process_finds_its_models_anew(tmp_path: Path) -> None:
    base, models = family(tmp_path, 1, SHAPES)
    url = upload(models[0])
    ref = Recipe.from_kwargs(upload(base), [url], "task_arithmetic").models[0]
    there = pickle.loads(pickle.dumps(replace(ref, found="/of/the/sender")))  # its stand-in is nobody else's
    assert there.local == ref.local != "/of/the/sender" and not there.in_memory
