"""The documentation site's generated pages: complete, and their recipes run."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import pymerge
from pymerge import methods

pytest.importorskip("transformers")

from tests.docs.world import World  # noqa: E402

ROOT = Path(__file__).parents[2]
NAMES = [name for name in methods.list() if not methods.get(name).package]


@pytest.fixture(scope="module")
def site() -> ModuleType:
    """docs/site/generate.py."""
    spec = importlib.util.spec_from_file_location("docs_site_generate", ROOT / "docs/site/generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def test_every_method_has_words_and_tests(site: ModuleType) -> None:
    said = site.method_pages.written()
    assert set(said) == set(NAMES), "docs/site/methods.yaml has one entry a method"
    assert set(NAMES) <= site.method_pages.readme_rows().keys(), "README.md's table has a row of each method"
    for name, words in said.items():
        assert words.keys() <= {"what", "when", "compare", "tests", "example"} and words["when"] and words["compare"]
        for test in words.get("tests", [f"tests/methods/test_{name}.py"]):
            assert name in (ROOT / test).read_text(), f"{test} does not speak of {name}"


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_of_a_methods_page_runs(
    name: str, site: ModuleType, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = site.method_pages.example(name)
    world.need(json.dumps(given))
    monkeypatch.chdir(world.folder)
    recipe = pymerge.Recipe.from_dict(given)
    recipe.run(tmp_path / "out")
    assert pymerge.verify(tmp_path / "out")["tensors"] > 0


@pytest.fixture(scope="module")
def pages(site: ModuleType) -> dict[str, str]:
    return site.pages()


def test_a_page_says_what_its_class_says(pages: dict[str, str]) -> None:
    for name in NAMES:
        info, page = methods.describe(name), pages[f"methods/{name}.md"]
        assert info.summary in page and all(f"| `{p.name}` |" in page for p in info.parameters)
    assert "https://arxiv.org/abs/2306.01708" in pages["methods/ties.md"]
    assert "prateeky2806/ties-merging" in pages["methods/ties.md"]
    ties = {p.name: p for p in methods.describe("ties").parameters}["density"]
    assert f"| {ties.default} | {ties.mergekit_default} | {ties.range} |" in pages["methods/ties.md"]


def test_the_reference_has_every_public_name(pages: dict[str, str]) -> None:
    for name in set(pymerge.__all__) - {"align", "linalg", "methods", "ops"}:
        assert f"\n## {name}\n" in pages["api/pymerge.md"], name
    assert "certified_rank" in pages["api/pymerge.linalg.md"]


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(cited["version"]) == pymerge.__version__
    assert {"cff-version", "message", "title", "authors", "license"} <= cited.keys()


def test_links_lead_somewhere(pages: dict[str, str], site: ModuleType, tmp_path: Path) -> None:
    site.write(tmp_path)
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*") if path.is_file()}
    there = written | {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    for name, text in pages.items():
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)):
            target = os.path.normpath(os.path.join(os.path.dirname(name), link))
            assert "://" in link or link.startswith("mailto:") or target in there, f"{name}: {link}"


def test_the_manual_is_the_readme(pages: dict[str, str]) -> None:
    manual = pages["manual.md"]
    assert "## Methods" in manual and "](docs/" not in manual and "](benchmarks/" not in manual


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for needed in ("ipykernel", "sklearn", "matplotlib"):
        pytest.importorskip(needed)
    notebook = nbformat.read(ROOT / "docs/demo.ipynb", as_version=4)
    assert len(notebook.cells) == 10
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = ["".join(out.get("text", "") for out in cell.get("outputs", ())) for cell in notebook.cells]
    assert "(individual models)" in printed[3] and printed[5].endswith("%\n")
    assert max(ast.literal_eval(printed[7]).values()) > 60
    assert any("image/png" in out.get("data", {}) for out in notebook.cells[8]["outputs"])
