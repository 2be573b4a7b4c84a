"""Which model a recipe means: paths, names on the Hub, revisions, adapters."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pymerge import hub
from pymerge.checkpoint.lora import base_of_adapter
from pymerge.engine.api import Recipe as RunnableRecipe
from pymerge.errors import RecipeError
from pymerge.recipe import ModelRef, Recipe
from pymerge.recipe.references import named_models
from tests.hub_cache import MAIN, cache_model
from tests.models import family, random_tensors, read_model, same, write_model

huggingface_hub = pytest.importorskip("huggingface_hub")
OTHER = "2" * 40


def reference(model: Any, **options: Any) -> ModelRef:
    raw = {"models": [{"model": model, "parameters": {"weight": 1}}], "merge_method": "linear"}
    return Recipe.from_dict(raw, **options).models[0]


@pytest.fixture
def cache(tmp_path):
    """A cache with org/model at two commits, an adapter, and a model whose second shard is a link to nothing."""
    home = tmp_path / "cache"
    model = write_model(tmp_path / "made", random_tensors(0))
    cache_model(home, "org/model", model)
    cache_model(home, "org/model", model, commit=OTHER, refs=("v2",))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    cache_model(home, "org/lora", adapter)
    part = cache_model(home, "part", write_model(tmp_path / "sharded", random_tensors(0), shards=2))
    os.unlink((part / "model-00002-of-00002.safetensors").resolve())
    with hub.access(home):
        yield home


def found(cache: Path, name: str, commit: str = MAIN) -> str:
    return str(cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit)


@pytest.mark.parametrize("name", ["a", "./a", "odd@name+x", "with space", "a.safetensors"])
def test_what_exists_is_a_path_whatever_its_characters(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir(exist_ok=True)
    for path in (name, str(tmp_path / name)):
        assert (reference(path).path, reference(path).local) == (path, path)


def test_mapping_form() -> None:
    assert reference({"model": {"path": "a"}}).path == "a"
    assert reference({"model": "a", "lora": None}).path == "a"
    assert reference({"path": "a", "revision": None}).path == "a"
    assert reference({"model": {"path": "a"}, "lora": {"path": "b"}}).path == reference("a+b").path == "a+b"


def test_names_on_the_hub(cache) -> None:
    for written, commit in {"org/model": MAIN, "org/model@main": MAIN, "org/model@v2": OTHER}.items():
        assert (reference(written).path, reference(written).local) == (written, found(cache, "org/model", commit))
    assert reference(f"org/model@{OTHER}").local == found(cache, "org/model", OTHER)
    with_lora = reference({"model": {"path": "org/model", "revision": "v2"}, "lora": {"path": "org/lora"}})
    assert with_lora.path == "org/model@v2+org/lora"
    assert with_lora.local == f"{found(cache, 'org/model', OTHER)}+{found(cache, 'org/lora')}"
    assert hub.commit_of(with_lora.local) == f"{OTHER}+{MAIN}"
    assert reference("a+org/lora@main").local == f"a+{found(cache, 'org/lora')}"
    assert reference("org/model").same_model(reference("org/model@main"))
    assert not reference("org/model").same_model(reference("org/model@v2"))


def test_a_folder_of_that_name_comes_first(cache, tmp_path) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert reference("org/model").local == "org/model"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("a+d", "a+d: d: no such file or folder, and no such model in the Hugging Face cache"),
        ("a@main", "a@main: a is a folder here, which has no revisions: give the folder that holds 'main'"),
        ("org/none", "org/none: no such file or folder, and no such model in the Hugging Face cache"),
        ("org/none@dev", "at revision dev in the Hugging Face cache"),
        ("org/model@dev", "download it with --download, or: hf download org/model --revision dev"),
        ("org/model@", "org/model@: no such file or folder"),
        ("./org/model", "./org/model: no such file or folder"),
        ("a/b/c", "a/b/c: no such file or folder (paths"),
        ("x.safetensors", "x.safetensors: no such file or folder (paths"),
        ({"model": {"path": "a", "revision": "main"}}, "a is a folder here, which has no revisions"),
        ({"model": "a", "lora": {"path": "d", "revision": "main"}}, "a+d@main: d@main: no such file or folder"),
        ({"model": {"path": "a", "revision": 3}}, "must be {path: TEXT, revision: TEXT}"),
        ({"modle": "a"}, "unknown key 'modle': did you mean model?"),
        ({"model": {"pth": "a"}}, "unknown key 'pth': did you mean path?"),
        ("", "must be the path of a model"),
        (None, "must be the path of a model"),
        (["a"], "must be the path of a model"),
        ("a\0b", "must be the path of a model"),
    ],
)
def test_refused(cache, model: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        reference(model)


def test_a_snapshot_in_part_is_refused_with_what_it_lacks(cache) -> None:
    with pytest.raises(RecipeError, match=r"part: incomplete .* lacks model-00002-of-00002.safetensors: download it"):
        reference("part")
    (cache / "models--part" / "snapshots" / MAIN / "config.json").unlink()
    with pytest.raises(RecipeError, match=r"lacks config.json, model-00002-of-00002.safetensors"):
        reference("part")
    (cache / "models--org--model" / "snapshots" / MAIN / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"lacks model.safetensors"):
        reference("org/model")


def test_what_else_a_snapshot_may_hold(tmp_path) -> None:
    held = (["model_index.json"], ["config.json", "pytorch_model.bin"], ["config.json", "other.safetensors"])
    for number, names in enumerate(held):
        folder = tmp_path / f"snapshot{number}"
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"")
        assert hub.lacking(folder) == []


def test_without_huggingface_hub(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert reference("a").local == "a"
    with pytest.raises(RecipeError, match=r"pip install 'pymerge\[hf\]'"):
        reference("org/model")


def test_nothing_is_downloaded_unasked(cache, monkeypatch) -> None:
    asked = []

    def fetch(name, **options):
        asked.append((name, options))
        return found(cache, "org/model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    reference("org/model@v2")
    with hub.access(cache, download=True):
        reference("org/model@v2")
    assert [options["local_files_only"] for _, options in asked] == [True, False]
    name, options = asked[1]
    assert (name, options["revision"], options["cache_dir"]) == ("org/model", "v2", str(cache))
    patterns = options["allow_patterns"]
    assert "*.safetensors" in patterns and not {"*.bin", "*.py", "*"} & set(patterns)


def test_a_failed_download_is_one_line(cache, monkeypatch) -> None:
    def fail(name, **options):
        raise OSError("the network\nis away")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with hub.access(cache, download=True), pytest.raises(RecipeError) as caught:
        reference("org/none")
    assert "cannot be downloaded: OSError: the network is away" in str(caught.value)


def test_the_base_that_an_adapter_names(cache, tmp_path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/model", "revision": "v2"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert base_of_adapter(tmp_path / "adapter") == found(cache, "org/model", OTHER)


def test_override_architecture_is_noted() -> None:
    raw = {"model": {"model": "a", "override_architecture": "LlamaForCausalLM"}, "parameters": {"weight": 1}}
    recipe = Recipe.from_dict({"models": [raw], "merge_method": "linear"})
    assert recipe.models[0].path == "a"
    assert recipe.notes == (
        "models[0]: override_architecture has no effect: models are merged by the names of their tensors",
    )


def test_names_given_by_the_caller(tmp_path) -> None:
    with named_models({"stage": str(tmp_path / "b"), "a": str(tmp_path / "c")}):
        assert (reference("stage").path, reference("stage").local) == ("stage", str(tmp_path / "b"))
        assert reference("a").local == str(tmp_path / "c")  # before the folder of that name
        assert reference("a+b").local == f"{tmp_path / 'c'}+b"
        assert reference("b").local == "b"
        with pytest.raises(RecipeError, match="stage is a folder here, which has no revisions"):
            reference("stage@main")


def test_a_recipe_can_be_read_without_its_models() -> None:
    assert reference("gone/model", models_must_exist=False).path == "gone/model"


def test_a_merge_of_cached_models_says_which(tmp_path) -> None:
    base, (one, two) = family(tmp_path, 2)
    for name, folder in {"org/base": base, "org/one": one}.items():
        cache_model(tmp_path / "cache", name, folder)
    raw = {
        "merge_method": "task_arithmetic",
        "base_model": "org/base",
        "models": [{"model": m, "parameters": {"weight": 0.5}} for m in ("org/one@main", str(two))],
    }
    paths = raw | {
        "base_model": str(base),
        "models": [m | {"model": p} for m, p in zip(raw["models"], (str(one), str(two)), strict=True)],
    }
    with hub.access(tmp_path / "cache"):
        summary = RunnableRecipe.from_dict(raw).run(tmp_path / "out")
    RunnableRecipe.from_dict(paths).run(tmp_path / "wanted")
    assert same(read_model(tmp_path / "out"), read_model(tmp_path / "wanted"))
    assert summary["recipe"]["base_model"] == "org/base" and summary["recipe"]["models"][0]["model"] == "org/one@main"
    assert {name: where["commit"] for name, where in summary["resolved"].items()} == {
        "org/base": MAIN,
        "org/one@main": MAIN,
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert '- "org/base"' in card and "`org/one@main`" in card and str(tmp_path) not in card.replace(str(two), "")
    assert "resolved" not in json.loads((tmp_path / "wanted" / "merge.json").read_text())
    assert torch.isfinite(read_model(tmp_path / "out")["embed.weight"]).all()


def test_the_command_line_looks_where_hf_home_says(tmp_path) -> None:
    base, (one, _) = family(tmp_path, 2)
    cache_model(tmp_path / "home" / "hub", "org/one", one)
    recipe = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: org/one, parameters: {weight: 1}}]\n"
    (tmp_path / "r.yaml").write_text(recipe)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    for home, code in {"home": 0, "elsewhere": 2}.items():
        done = subprocess.run(
            [sys.executable, "-m", "pymerge", "plan", "r.yaml"],
            env=environment | {"HF_HOME": str(tmp_path / home), "PYTHONPATH": os.fspath(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
    assert f"no such model in the Hugging Face cache {tmp_path / 'elsewhere' / 'hub'}: download it" in done.stderr
