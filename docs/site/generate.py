"""Writes the generated pages of the documentation site into a folder: python docs/site/generate.py FOLDER

Methods and API come from the code, the manual from README.md, the demo from its notebook; `make docs` puts them beside
the pages that are written by hand.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import api_pages  # noqa: E402
import method_pages  # noqa: E402

from pymerge import methods  # noqa: E402

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SOURCE = re.compile(r"\[([^\]]+)\]\(((?:pymerge|benchmarks|csrc|tests)/[^)]*)\)")  # what is left behind relinked's own


def relinked(text: str) -> str:
    """Text of a file at the top of the repository, with its links as they are on a page of the site."""
    moved = {"docs/own_method)": "own_method/README.md)", "docs/demo.ipynb": "demo.md", "docs/": ""}
    for there, here in (moved | {"CONTRIBUTING.md": "contributing.md"}).items():
        text = text.replace(f"]({there}", f"]({here}")
    text = re.sub(r"\]\(benchmarks/results/([^)]*\.(?:md|png))\)", r"](results/\1)", text)
    return SOURCE.sub(r"\1 (`\2`)", text)  # the site has no sources


def manual() -> str:
    """README.md from its example on."""
    text = (ROOT / "README.md").read_text()
    return "# Manual\n\n" + relinked(text[text.index("\n## ") + 1 :])


def demo() -> str:
    """The notebook as a page, without its outputs."""
    cells = json.loads((ROOT / "docs/demo.ipynb").read_text())["cells"]
    texts = ("".join(cell["source"]) for cell in cells)
    kinds = (cell["cell_type"] for cell in cells)
    return "\n\n".join(
        f"```python\n{text}\n```" if kind == "code" else text for kind, text in zip(kinds, texts, strict=True)
    )


def pages() -> dict[str, str]:
    """{path within the site: Markdown}."""
    found = {f"methods/{name}.md": method_pages.page(name) for name in methods.list()}
    found["methods/index.md"] = method_pages.overview()
    found |= {f"api/{module}.md": api_pages.page(module) for module in api_pages.PAGES}
    found |= {"manual.md": manual(), "demo.md": demo()}
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        found[name.lower()] = relinked((ROOT / name).read_text())
    found |= {f"results/{path.name}": path.read_text() for path in RESULTS.glob("*.md")}
    return {path: re.sub(r"\n{3,}", "\n\n", text) for path, text in found.items()}


def write(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for path, text in pages().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    for picture in RESULTS.glob("*.png"):
        shutil.copy(picture, folder / "results")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
