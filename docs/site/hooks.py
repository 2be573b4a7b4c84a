"""Joins the generated pages (docs/site/generate.py) to those of docs/. mkdocs.yml says where they are: `generated`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

GROUPS = {"Methods": "methods", "API": "api", "Measured": "results"}  # entries of the navigation that list a folder


def folder_of(config: Any) -> Path:
    return (Path(config.config_file_path).parent / config.extra["generated"]).resolve()


def on_config(config: Any) -> Any:
    """Fills in the navigation."""
    if not folder_of(config).is_dir():
        raise SystemExit(f"{folder_of(config)} is not there: `make docs` writes it first")
    for entry in config.nav:
        for title, group in GROUPS.items():
            if isinstance(entry, dict) and entry.get(title) == group:
                both = (*(folder_of(config) / group).glob("*.md"), *(Path(config.docs_dir) / group).glob("*.md"))
                paths = sorted(both, key=lambda p: (p.stem != "index", p.stem))
                entry[title] = [{"Overview" if p.stem == "index" else p.stem: f"{group}/{p.name}"} for p in paths]
    return config


def on_files(files: Files, config: Any) -> Files:
    folder = folder_of(config)
    for path in sorted(folder.rglob("*.md")):
        files.append(File.generated(config, str(path.relative_to(folder)), content=path.read_text()))
    for path in sorted(folder.rglob("*.png")):
        files.append(File.generated(config, str(path.relative_to(folder)), content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Pages of docs/ link to results of benchmarks where these are in the repository."""
    return markdown.replace("](../benchmarks/results/", "](results/")
