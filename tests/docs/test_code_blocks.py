"""Every code block of README and docs runs, or says why it does not; what is said of Markdown holds of the collector."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from pymerge import methods  # noqa: E402
from tests.docs.blocks import Block, blocks_in, blocks_of  # noqa: E402
from tests.docs.running import ROOT, Page  # noqa: E402
from tests.docs.world import World  # noqa: E402

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
HINT = (
    "What blocks may name is made by tests/docs/world.py: {known}. A block that cannot run here has a comment "
    "in front of it: <!-- not run: REASON -->"
)


def problems_of(blocks: Sequence[Block], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each block that fails, by page and line; the ones behind it run all the same."""
    page, found, known = Page(folder), [], set(methods.list())
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, page.module.__name__, page.module)
    try:
        for block in blocks:
            if block.run_by:
                if not (ROOT / block.run_by).is_file():
                    found.append(f"{block.place}: run by {block.run_by}, which does not exist")
            elif not block.not_run:
                try:
                    page.run(block)
                except Exception as error:
                    found.append(f"{block.place}: {type(error).__name__}: {error}")
    finally:
        for name in set(methods.list()) - known:  # what a page registered is its own
            del methods.REGISTRY[name]
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property) -> None:
    blocks = blocks_of(path, ROOT)
    record_property("code_blocks", blocks)
    problems = problems_of(blocks, tmp_path, monkeypatch)
    known = ", ".join(World(tmp_path).names)
    assert not problems, "\n\n".join([*problems, HINT.format(known=known)])
