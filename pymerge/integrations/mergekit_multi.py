"""Several merges in one file, later ones of the results of earlier ones: mergekit-multi's documents.

All documents are read, ordered and planned before the first is merged. What an earlier document will write is known by
its plan: names, shapes and dtypes, as files with headers and holes in a temporary folder, against which later ones are
checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Final

import yaml

from pymerge import hub
from pymerge.checkpoint import Layout, check_output_path, open_checkpoint
from pymerge.checkpoint.index import write_index
from pymerge.engine.local import Extras, copy_beside, identity, opened_plan, read_summary
from pymerge.errors import MergeError, RecipeError
from pymerge.integrations.mergekit_options import MergekitOptions
from pymerge.integrations.mergekit_yaml import may_replace, merge, recipe_of
from pymerge.recipe import Recipe
from pymerge.recipe.references import named_models, names_in
from pymerge.recipe.yaml_text import read_documents as documents_in

# Other values give the same model, within rounding: no reason to merge again.
NOT_COMPARED: Final = ("device", "placement", "item_threads", "observing_threads")


@dataclass(frozen=True)
class Document:
    """One merge of the file. name: None for the one without."""

    name: str | None
    raw: Mapping[Any, Any]
    out: Path
    source: str

    @property
    def text(self) -> str:
        return yaml.safe_dump(dict(self.raw), sort_keys=False, allow_unicode=True)

    def needs(self) -> list[str]:
        """Names of `named_models` that it has as models."""
        given = [text for entry in _models_in(self.raw) if (text := _text(entry)) is not None]
        return list(dict.fromkeys(name for text in given for name in names_in(text)))


def read_documents(config: Path, intermediate_dir: Path, out_path: Path | None) -> list[Document]:
    """The documents of a file, each after those that it needs.

    Raises   RecipeError: no mapping, names given twice or that are no folder names, no folder for the one without a
             name, a cycle."""
    documents: dict[str | None, Document] = {}
    for number, raw in enumerate(documents_in(config), 1):
        where = f"{config}: document {number}"
        if not isinstance(raw, dict):
            raise RecipeError(f"{where}: a recipe is a mapping of keys to values, got {type(raw).__name__}")
        name = raw.pop("name", None)
        if name is not None and (not isinstance(name, str) or Path(name).name != name or name in (".", "..")):
            raise RecipeError(f"{where}: name must be that of a folder below --intermediate-dir, got {name!r}")
        if name in documents:
            what = "has no name, like another one" if name is None else f"is named {name!r}, like another one"
            raise RecipeError(f"{where}: {what}: give each its own name")
        if name is None and out_path is None:
            raise RecipeError(f"{where}: has no name: say where to write it with --out-path, or name it")
        out = out_path if name is None else intermediate_dir / name
        assert out is not None
        documents[name] = Document(name, raw, out, where if name is None else f"{where} ({name})")
    if not documents:
        raise RecipeError(f"{config}: holds no document")
    folders = {name: Path(os.path.realpath(document.out)) for name, document in documents.items()}
    if None in folders and any(_nested(folders[None], folder) for name, folder in folders.items() if name is not None):
        raise RecipeError(f"{config}: --out-path {out_path} and the folder of a named merge lie in each other")
    return _ordered(documents, config)


def _nested(one: Path, other: Path) -> bool:
    return one in (other, *other.parents) or other in one.parents


def _ordered(documents: Mapping[str | None, Document], config: Path) -> list[Document]:
    with named_models({name: str(d.out) for name, d in documents.items() if name is not None}):
        graph = {name: document.needs() for name, document in documents.items()}
    try:
        return [documents[name] for name in TopologicalSorter(graph).static_order()]
    except CycleError as e:
        raise RecipeError(f"{config}: merges that need each other: {' -> '.join(reversed(e.args[1]))}") from None


def _models_in(raw: Any) -> Iterator[Any]:
    """What may be a reference to a model: of models, slices, modules, tokenizers, tokens."""
    if isinstance(raw, Mapping):
        for key, value in raw.items():
            if key in ("model", "base_model", "tokenizer_source", "source"):
                yield value
            yield from _models_in(value)
    elif isinstance(raw, list):
        for value in raw:
            yield from _models_in(value)


def _text(entry: Any) -> str | None:
    """A reference to a model, as far as its name goes."""
    while isinstance(entry, Mapping):
        entry = entry.get("model", entry.get("path"))
    return entry if isinstance(entry, str) else None


def run(
    documents: Sequence[Document],
    options: MergekitOptions,
    *,
    lazy: bool = True,
    warn: Callable[[list[str]], None] = lambda remarks: None,
) -> Iterator[tuple[Document, dict[str, Any] | None]]:
    """Plans all documents, then merges them in order; yields each with its summary, or None where it was finished
    before: by the same recipe, of inputs that have not changed (lazy).

    Raises   MergeError with the document's place: for what headers and recipes tell before anything is merged."""
    for remarks in _check(documents, options, lazy=lazy):
        warn(remarks)
    for document in documents:
        yield document, _merge(document, _folders(documents, {}), options, lazy=lazy)


@contextmanager
def read(
    document: Document, folders: Mapping[str, str], options: MergekitOptions
) -> Iterator[tuple[Recipe, list[str]]]:
    """A document's recipe and what is worth a warning, where names mean these folders; an error inside says of which
    document it is."""
    with hub.access(options.transformers_cache, download=options.download), named_models(folders):
        try:
            yield recipe_of(document.raw, document.source, options)
        except MergeError as error:
            if not str(error).startswith(document.source):
                error.args = (f"{document.source}: {error}",)
            raise


def _folders(documents: Sequence[Document], instead: Mapping[str, str]) -> dict[str, str]:
    return {d.name: instead.get(d.name, str(d.out)) for d in documents if d.name is not None}


def _check(documents: Sequence[Document], options: MergekitOptions, *, lazy: bool) -> list[list[str]]:
    """Plans every document, on the headers of what those before it will write; the warnings of each."""
    found, skeletons = [], {}
    with tempfile.TemporaryDirectory(prefix="pymerge-multi-") as temporary:
        for number, document in enumerate(documents):
            skeleton = Path(temporary) / str(number)
            with read(document, _folders(documents, skeletons), options) as (recipe, remarks):
                found.append(remarks)
                if _digest_unless_finished(document, recipe, options, lazy, skeleton) and document.name is not None:
                    skeletons[document.name] = str(skeleton)
    return found


def _merge(
    document: Document, folders: Mapping[str, str], options: MergekitOptions, *, lazy: bool
) -> dict[str, Any] | None:
    with read(document, folders, options) as (recipe, _):
        digest = _digest_unless_finished(document, recipe, options, lazy)
        if digest is None:
            return None
        return merge(recipe, document.text, document.out, options, {"multi": digest})


def _digest_unless_finished(
    document: Document, recipe: Recipe, options: MergekitOptions, lazy: bool, skeleton: Path | None = None
) -> str | None:
    """What names the merge and its inputs, checked as far as headers tell; None where its output is there already.

    skeleton  a folder to make that looks like the output
    """
    chosen = options.for_merge(overwrite=False)
    with opened_plan(recipe, chosen) as (inputs, plan):
        digest = _digest(identity(recipe, inputs, chosen, plan))
        if lazy and _is_finished(document.out, digest):
            return None
        check_output_path(document.out, inputs.all, overwrite=may_replace(document.out, options))
        if skeleton is not None:
            write_skeleton(skeleton, plan.layout)
            copy_beside(skeleton, recipe, inputs, Extras())
    return digest


def _digest(of: Mapping[str, Any]) -> str:
    compared = {key: value for key, value in of.items() if key not in NOT_COMPARED}
    text = json.dumps(compared, sort_keys=True).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _is_finished(out: Path, digest: str) -> bool:
    """Whether a folder holds the whole output of that merge, as far as headers tell."""
    try:
        summary = read_summary(out)
        if summary["multi"] != digest:
            return False
        with open_checkpoint(out) as written:
            return set(written) == set(summary["checksums"])
    except (OSError, ValueError, KeyError, TypeError, MergeError):
        return False


def write_skeleton(folder: Path, layout: Layout) -> None:
    """Weight files with their headers and, in place of the tensors, holes that take no room on disk."""
    folder.mkdir()
    for shard in layout.shards:
        path = folder / shard.file
        path.parent.mkdir(exist_ok=True)
        with open(path, "wb") as file:
            file.write(shard.header)
            file.truncate(shard.size)
    write_index(folder, layout)
