"""Every code block of README and docs runs, or says why it does not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

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


PAGE = """# Page

    pymerge methods

1. A list
    with a paragraph, no code

<!-- not run: needs a GPU -->
```yaml
merge_method: ties
```

<!-- first:
a = 1
-->
```python
assert a == 1
```

```text
no code
```
"""


def test_blocks_are_found_with_their_marks() -> None:
    found = [(b.line, b.language, b.text, b.not_run, b.first) for b in blocks_in(PAGE, "page.md")]
    assert found == [
        (3, "console", "pymerge methods\n", "", ""),
        (9, "yaml", "merge_method: ties\n", "needs a GPU", ""),
        (16, "python", "assert a == 1\n", "", "a = 1"),
    ]


@pytest.mark.parametrize(
    "text",
    ["```python\nx = 1", "<!-- not run: why", "<!-- not run: nothing behind it -->\n\nwords\n"],
    ids=["fence", "comment", "mark"],
)
def test_pages_with_a_loose_end_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="page.md"):
        blocks_in(text, "page.md")


BROKEN = """
```yaml
merge_method: linear
models: [{model: ./maths}]
```

    make bread

or

    git clone x

or

    pip install "pymerge[everything]"

```rust
```

```python
x = 1 / 0
```

```python
x = 1
```
"""


def test_a_failure_says_page_and_line_and_the_page_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = problems_of(blocks_in(BROKEN, "page.md"), tmp_path, monkeypatch)
    assert [problem.partition(": ")[0] for problem in said] == [f"page.md:{n}" for n in (2, 7, 11, 15, 17, 20)]
    words = ("./maths: no such file", "no target bread", "'git' is no command", "everything", "'rust'", "ZeroDivision")
    assert all(word in problem for word, problem in zip(words, said, strict=True))


FRAGMENTS = """
## One

```yaml
# first.yaml
merge_method: linear
base_model: base
models: [{model: math}, {model: code}]
parameters: {weight: 1}
```

```yaml
merge_method: iso_c
```

## Two

```yaml
dtype: bfloat16
```

## Three

    pymerge plan recipe.yaml
"""


def test_fragments_complete_the_recipe_before_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Page(tmp_path)
    monkeypatch.chdir(tmp_path)
    for block in blocks_in(FRAGMENTS, "page.md"):
        page.run(block)
    models = [{"model": "math"}, {"model": "code"}]
    assert page.recipes["One"] == {"base_model": "base", "models": models, "merge_method": "iso_c"}
    assert page.recipes["Two"] == page.recipes["One"] | {"dtype": "bfloat16"}
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == page.recipes["One"]
    assert yaml.safe_load((tmp_path / "first.yaml").read_text())["parameters"] == {"weight": 1}
