"""The model card (README.md) of a merged model, as the Hugging Face Hub reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

LIBRARIES = {  # by the file that says what to load
    "model_index.json": "diffusers",
    "modules.json": "sentence-transformers",
    "config.json": "transformers",
}


class Described(Protocol):
    """What a card needs of a recipe."""

    def to_dict(self) -> dict[str, Any]: ...

    def to_yaml(self) -> str: ...


def write_card(folder: Path, recipe: Described, summary: Mapping[str, Any]) -> None:
    """Write README.md into `folder`."""
    library = next((library for file, library in LIBRARIES.items() if (folder / file).exists()), None)
    (folder / "README.md").write_text(model_card(recipe, summary, library), encoding="utf-8")


def model_card(recipe: Described, summary: Mapping[str, Any], library: str | None) -> str:
    """Front matter for the Hub (base_model list, tags, library), then what was merged, how, and the recipe."""
    plain = recipe.to_dict()
    method = str(plain["merge_method"])
    base = plain.get("base_model")
    models = list(dict.fromkeys(_models(plain)))
    parents = [*([str(base)] if base else []), *(m for m in models if m != base)]
    lines = ["---", "base_model:", *(f"- {_quoted(p)}" for p in parents)]
    if library:
        lines.append(f"library_name: {library}")
    lines += ["tags:", "- merge", "- pymerge", f"- {_quoted(method)}", "---", "", "# Merged model", ""]
    lines += [f"Merged with pymerge {summary.get('pymerge', '')} by the method `{method}`.", ""]
    lines += ["| role | model |", "|---|---|"]
    lines += [f"| base | {_cell(str(base))} |"] if base else []
    lines += [f"| merged | {_cell(m)} |" for m in models]
    relaxed = summary.get("relaxations") or {}
    if relaxed:
        lines += [
            "",
            "Checks that the recipe relaxed: " + ", ".join(f"{_cell(f'{k}: {v}')}" for k, v in relaxed.items()),
        ]
    recipe_text = recipe.to_yaml().rstrip("\n")
    fence = _fence(recipe_text)
    lines += ["", "## Recipe", "", f"{fence}yaml", recipe_text, fence, ""]
    lines += ["`merge.json` beside the weights holds versions, input fingerprints and a checksum of every tensor.", ""]
    return "\n".join(lines)


def _models(plain: Any) -> Iterator[str]:
    """All that a recipe merges: its models, or the sources of its slices, whose bases count."""
    for key, value in plain.items() if isinstance(plain, Mapping) else ():
        if key in ("models", "sources"):
            yield from (str(m["model"] if isinstance(m, Mapping) else m) for m in value)
        elif key == "slices":
            for entry in value:
                yield from _models(entry)
                yield from [str(entry["base_model"])] if "base_model" in entry else []
        elif key == "modules":
            for module in value.values():
                yield from _models(module)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a JSON string is a YAML string


def _cell(text: str) -> str:
    """Inline code in a table, whatever the text is."""
    clean = "".join(c if c.isprintable() else " " for c in text).replace("|", "\\|")
    fence = _fence(clean, shortest=1)
    return f"{fence} {clean} {fence}" if "`" in clean else f"{fence}{clean}{fence}"


def _fence(text: str, shortest: int = 3) -> str:
    """A run of backticks longer than any in the text."""
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    return "`" * max(shortest, longest + 1)
