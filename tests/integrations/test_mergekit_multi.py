"""pymerge-multi: several merges in one file, in the order in which they need each other, resumable."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml

import pymerge
from pymerge.errors import NonFinite, OutputError, RecipeError, ShapeMismatch
from pymerge.integrations.mergekit_multi import read_documents, run
from pymerge.integrations.mergekit_options import MergekitOptions
from tests.integrations.mergekit_models import door, llama_tensors, summary_of, write_llamas
from tests.models import interrupted_after, read_model, same


def linear(*models: str, **more) -> dict:
    listed = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    return {"merge_method": "linear", "models": listed, "dtype": "float32"} | more


LAST = {
    "merge_method": "slerp",
    "base_model": "first",
    "models": [{"model": "first"}, {"model": {"model": {"path": "second"}}}],
    "parameters": {"t": 0.5},
}
DOCUMENTS = [LAST, linear("first", "b", name="second"), linear("a", "b", name="first")]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    nan = llama_tensors(1)["model.norm.weight"].clone()
    nan[3] = float("nan")
    write_llamas(tmp_path, wide={"model.norm.weight": torch.ones(17)}, nan={"model.norm.weight": nan})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(documents: list[dict], name: str = "multi.yml") -> Path:
    Path(name).write_text(yaml.safe_dump_all(documents))
    return Path(name)


def run_all(documents: list[dict], *, lazy: bool = True, **options) -> dict[str, bool]:
    """Folder -> whether it was merged now."""
    listed = read_documents(write(documents), Path("inter"), Path("out"))
    results = run(listed, MergekitOptions(quiet=True, **options), lazy=lazy)
    return {str(document.out): summary is not None for document, summary in results}


ALL = {"inter/first": True, "inter/second": True, "out": True}


def test_merges_in_order_and_names_them(models) -> None:
    write(DOCUMENTS)
    done = door("multi", "multi.yml", "-I", "inter", "--out-path", "out", folder=models)
    assert done.returncode == 0 and not done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines() if "tensors," in line] == list(ALL)
    pymerge.run_merge(linear("a", "b"), "w1")
    pymerge.run_merge(linear("w1", "b"), "w2")
    pymerge.run_merge(LAST | {"base_model": "w1", "models": [{"model": "w1"}, {"model": "w2"}]}, "w3")
    for made, wanted in {"inter/first": "w1", "inter/second": "w2", "out": "w3"}.items():
        assert same(read_model(models / made), read_model(models / wanted)), made
    summary = summary_of(models / "out")
    assert summary["recipe"]["models"] == [{"model": "first"}, {"model": "second"}]
    assert summary["resolved"]["first"] == {"path": "inter/first", "commit": None}
    assert "name" not in yaml.safe_load((models / "inter" / "first" / "mergekit_config.yml").read_text())
    again = door("multi", "multi.yml", "-I", "inter", "--out-path", "out", folder=models)
    assert again.stdout.splitlines() == [f"{folder}: finished before, skipped" for folder in ALL]


def test_what_is_finished_is_skipped_only_while_it_is_what_would_be_made(models) -> None:
    assert run_all(DOCUMENTS) == ALL
    assert run_all(DOCUMENTS) == dict.fromkeys(ALL, False)
    assert run_all(DOCUMENTS, lazy=False) == ALL
    changed = [LAST | {"parameters": {"t": 0.4}}, *DOCUMENTS[1:]]
    assert run_all(changed) == {"inter/first": False, "inter/second": False, "out": True}
    os.utime("a/model.safetensors")
    assert run_all(changed) == ALL
    os.truncate("inter/second/model.safetensors", 9000)
    assert run_all(changed) == {"inter/first": False, "inter/second": True, "out": True}


def test_an_interrupted_run_is_continued(models) -> None:
    assert run_all(DOCUMENTS, out_shard_size=3000) == ALL
    wanted = {folder: read_model(models / folder) for folder in ALL}
    for folder in ALL:
        os.rename(folder, f"{folder}.old")
    documents = read_documents(write(DOCUMENTS), Path("inter"), Path("out"))
    with interrupted_after(30):  # 21 tensors a merge
        for _ in run(documents, MergekitOptions(quiet=True, out_shard_size=3000)):
            pass
    assert sorted(os.listdir("inter")) == ["first", "first.old", "second.old", "second.partial"]
    assert run_all(DOCUMENTS, out_shard_size=3000) == ALL | {"inter/first": False}
    assert all(same(read_model(models / folder), wanted[folder]) for folder in ALL)
    assert not Path("inter/second.partial").exists()


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (
            [linear("two", "a", name="one"), linear("one", "a", name="two")],
            r"need each other: (one -> two -> one|two -> one -> two)",
        ),
        ([linear("one", "a", name="one")], "need each other: one -> one"),
        (
            [linear("a", "b", name="one"), linear("three", "a", name="two")],
            r"document 2 \(two\): models\[0\]: three: no such file",
        ),
        ([linear("a", "b", name="one"), linear("a", name="one")], "document 2: is named 'one', like another one"),
        ([linear("a", "b"), linear("a", "b")], "document 2: has no name, like another one"),
        ([linear("a", "b", name="../one")], "name must be that of a folder below --intermediate-dir, got '../one'"),
        ([linear("a", "b", name=3)], "got 3"),
        ([linear("a", "b", name=["x"])], "got \\['x'\\]"),
        ([], "holds no document"),
        (
            [linear("a", "b", name="one"), linear("one@v2", "b", name="two")],
            "one is a folder here, which has no revisions",
        ),
        ([linear("a", "b", name="one"), ["x"]], "document 2: a recipe is a mapping"),
        (
            [linear("a", "b", name="one"), linear("one", "b", merge_method="x", name="two")],
            r"document 2 \(two\): .*unknown method",
        ),
    ],
)
def test_refused_before_anything_runs(models, documents, message) -> None:
    with pytest.raises(RecipeError, match=message):
        run_all(documents)
    assert not Path("inter").exists() and not Path("out").exists()


def test_the_one_without_a_name_needs_a_folder_of_its_own(models) -> None:
    done = door("multi", write(DOCUMENTS), "-I", "inter", folder=models)
    assert done.returncode == 2 and "document 1: has no name: say where to write it with --out-path" in done.stderr
    for out in ("inter", "inter/first", "inter/first/below"):
        with pytest.raises(RecipeError, match="lie in each other"):
            read_documents(Path("multi.yml"), Path("inter"), Path(out))


def test_later_merges_are_checked_before_the_first_runs(models) -> None:
    documents = [linear("a", "b", name="first"), linear("first", "wide")]
    with pytest.raises(ShapeMismatch, match=r"document 2: model.norm.weight: first is \[16\], wide is \[17\]"):
        run_all(documents)
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"document 1: out: holds files that no merge wrote"):
        run_all(DOCUMENTS)
    assert not Path("inter").exists() and os.listdir("out") == ["notes.txt"]


def test_an_error_while_merging_says_where(models) -> None:
    with pytest.raises(NonFinite, match=r"multi.yml: document 1 \(second\): model.norm.weight"):
        run_all([linear("first", "nan", name="second"), linear("a", "b", name="first")])
    assert os.listdir("inter") == ["first"]


def test_a_document_comes_before_a_folder_of_its_name(models) -> None:
    assert run_all([linear("b", "base", name="a"), linear("a", "b")]) == {"inter/a": True, "out": True}
    pymerge.run_merge(linear("inter/a", "b"), "wanted")
    assert same(read_model(models / "out"), read_model(models / "wanted"))


def test_ignored_keys_are_warned_of_once(models) -> None:
    write([linear("a", "b", name="first", densty=1), linear("first", "b")])
    done = door("multi", "multi.yml", "-I", "inter", "--out-path", "out", folder=models)
    assert done.returncode == 0 and done.stderr.count("densty") == 1
    assert any("densty" in note for note in summary_of(models / "inter" / "first")["notes"])
