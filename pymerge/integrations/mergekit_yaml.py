"""What calls mergekit, served by pymerge: its YAML files with its leniency, its options, `run_merge`.

mergekit is not imported. Where it does not check and pymerge does (decisions on strictness), keys without effect,
tensors that the base lacks and integer buffers that differ are let pass, each listed in merge.json; what would change
weights unasked (a missing tensor, NaN, overflow, other vocabularies) stays an error.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from pymerge import hub
from pymerge.checkpoint.header import name_list
from pymerge.checkpoint.index import read_json_object
from pymerge.checkpoint.place import real_output
from pymerge.checkpoint.sidefiles import COPIED
from pymerge.engine.local import Extras, merge_to_disk
from pymerge.errors import MergeError, OutputError, RecipeError
from pymerge.integrations.mergekit_options import MergekitOptions
from pymerge.recipe import Recipe
from pymerge.recipe.problems import Problems
from pymerge.recipe.yaml_text import parse_yaml, read_yaml

CONFIG_COPY: Final = "mergekit_config.yml"
LENIENT: Final = {"extra": "drop", "buffers": "base"}
WRITTEN: Final = ("merge.json", CONFIG_COPY, "README.md", "config.json", "*.safetensors", "*.safetensors.index.json")
MAX_SUMMARY: Final = 1_000_000_000


class MergekitProblems(Problems):
    """What mergekit ignores is a note."""

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self.ignored: list[str] = []

    def useless(self, where: str, what: str) -> None:
        text = f"ignored, as by mergekit: {f'{where}: ' if where else ''}{what}"
        self.ignored.append(text)
        self.note(text)


def run_merge(
    merge_config: Any, out_path: str | os.PathLike[str], options: Any = None, config_source: str | None = None
) -> dict[str, Any]:
    """Merge as mergekit's function of this name does.

    merge_config   a mapping, YAML text, a path of a YAML file, or an object with to_yaml() or model_dump(): mergekit's
                   MergeConfiguration
    out_path       the folder to write; one that holds the output of an earlier merge, and nothing else, is replaced
                   when the new model is complete
    options        pymerge.Options, a mapping with mergekit's option names, or an object with such attributes:
                   mergekit's MergeOptions
    config_source  the text for mergekit_config.yml. Default: the configuration's own
    Returns        the summary that is also written to merge.json
    Raises         MergeError. Warns of what is ignored."""
    raw, text = config_of(merge_config)
    chosen = MergekitOptions.of(options)
    with hub.access(chosen.transformers_cache, download=chosen.download):
        recipe, remarks = recipe_of(raw, "merge_config", chosen)
        for remark in remarks:
            warnings.warn(remark, stacklevel=2)
        return merge(recipe, config_source or text, Path(out_path), chosen)


def config_of(given: Any) -> tuple[dict[Any, Any], str]:
    """(plain data, YAML text) of a configuration."""
    text: str | None = None
    if isinstance(given, str) and ("\n" in given or (":" in given and not os.path.exists(given))):
        text = given
    elif isinstance(given, str | os.PathLike):
        return _mapping(read_yaml(Path(given)), os.fspath(given)), Path(given).read_text(encoding="utf-8")
    elif hasattr(given, "to_yaml"):
        text = given.to_yaml()
    if text is not None:
        return _mapping(parse_yaml(text, "merge_config"), "merge_config"), text
    import yaml

    dump = getattr(given, "model_dump", None)
    raw = _mapping(given if dump is None else dump(mode="json", exclude_none=True), "merge_config")
    try:
        return raw, yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
    except yaml.YAMLError:
        raise RecipeError("merge_config: must hold plain data (text, numbers, lists, mappings)") from None


def _mapping(raw: Any, source: str) -> dict[Any, Any]:
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{source}: a recipe is a mapping of keys to values, got {type(raw).__name__}")
    return dict(raw)


def recipe_of(raw: Mapping[Any, Any], source: str, options: MergekitOptions) -> tuple[Recipe, list[str]]:
    """The checked recipe with mergekit's leniency, and what is worth a warning: all of it is in the recipe's notes."""
    raw, problems = dict(raw), MergekitProblems(source)
    relax = raw.get("relax")
    if relax is None or isinstance(relax, Mapping):
        asked = {"vocabulary": "truncate"} if options.unsafe_truncate_embeddings else {}
        raw["relax"] = LENIENT | asked | dict(relax or {})
    if options.random_seed is not None:
        raw["seed"] = options.random_seed
    remarks = options.remarks()
    for remark in remarks:
        problems.note(remark)
    recipe = Recipe.from_dict(raw, source=source, problems=problems)
    return recipe, [*remarks, *problems.ignored]


def merge(
    recipe: Recipe, text: str, out: Path, options: MergekitOptions, summary: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Merges into `out`, with the files that mergekit leaves. summary: goes into merge.json."""
    files = {CONFIG_COPY: text if text.endswith("\n") else f"{text}\n"} if options.write_model_card else {}
    extras = Extras(summary=summary or {}, files=files, card=options.write_model_card, tokenizer=options.copy_tokenizer)
    return merge_to_disk(recipe, out, options.for_merge(overwrite=may_replace(out, options)), extras)


def may_replace(out: Path, options: MergekitOptions) -> bool:
    """Whether an existing folder may be replaced: when that is asked for, or when it holds the output of a merge and
    nothing else (mergekit writes into any folder).

    Raises   OutputError: files of another kind are in it."""
    folder = real_output(out)
    overwrite = options.overwrite or (options.engine is not None and options.engine.overwrite)
    if overwrite or not folder.is_dir() or not (names := os.listdir(folder)):
        return overwrite
    known = [*WRITTEN, *COPIED, *_side_files(folder)]
    foreign = sorted(name for name in names if not any(fnmatchcase(name, pattern) for pattern in known))
    if foreign or not any((folder / name).is_file() for name in ("merge.json", CONFIG_COPY)):
        what = f"files that no merge wrote ({name_list(foreign)})" if foreign else "a model that no merge wrote"
        raise OutputError(f"{out}: holds {what}: choose another folder, or --overwrite to replace all that is in it")
    return True


def _side_files(folder: Path) -> list[str]:
    """Names at the top of a folder that its merge.json says were written beside the weights."""
    try:
        written = read_json_object(folder / "merge.json", MAX_SUMMARY).get("side_files", [])
        return [name.split("/")[0] for name in written]
    except (MergeError, OSError, json.JSONDecodeError, AttributeError, TypeError):
        return []
