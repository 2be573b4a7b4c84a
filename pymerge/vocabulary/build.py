"""From `tokenizer` and `chat_template` of a recipe and its opened models to models of one vocabulary, and to the files
and config entries that go with it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pymerge.checkpoint import Checkpoint, safe_name
from pymerge.checkpoint.sidefiles import TOKENIZER
from pymerge.errors import InputError, RecipeError
from pymerge.recipe.models import ModelRef
from pymerge.recipe.references import split_adapter
from pymerge.recipe.tokenizer import TokenRule, Vocabulary
from pymerge.vocabulary.ids import Ids
from pymerge.vocabulary.plan import Known, RowPlan, plan_rows
from pymerge.vocabulary.templates import chosen
from pymerge.vocabulary.tensors import size_changes, vocabulary_tensors
from pymerge.vocabulary.tokenizers import (
    Vocab,
    check_without_holes,
    files_digest,
    joined,
    load_tokenizer,
    saved,
    special_ids,
    tokens_of,
    with_template_files,
)
from pymerge.vocabulary.views import common_sizes, truncated, with_rows


@dataclass(frozen=True)
class Member:
    """One of the distinct models of a recipe."""

    ref: ModelRef
    model: Checkpoint

    @property
    def label(self) -> str:
        return safe_name(self.ref.path)

    @property
    def folder(self) -> Path:
        """Where its tokenizer is; InputError where there is none."""
        if self.model.folder is None:
            raise InputError(f"{self.label}: no folder with a tokenizer, which the tokenizer keys of the recipe need")
        return self.model.folder


@dataclass(frozen=True, kw_only=True)
class NewVocabulary:
    """What a merged model has of its own beside the weights.

    digest     equal for equal tokenizer files, rows and template: part of what a resumed merge must find again
    summary    for merge.json; notes: the same in words
    config     dotted key -> value, of config.json
    files      name -> content
    without    patterns of the base's files that are not copied
    """

    digest: str
    summary: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    def write(self, folder: Path) -> list[str]:
        """Writes the files into the output's folder; their names."""
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return list(self.files)

    def beside(self, other: NewVocabulary) -> NewVocabulary:
        """Both, of which this one has the template and the other one the rows."""
        return replace(
            self,
            digest=digest_of(self.digest, other.digest),
            summary={**other.summary, **self.summary},
            notes=(*other.notes, *self.notes),
            config=other.config,
        )


def rebuilt(
    spec: Vocabulary, template: str | None, members: Sequence[Member], base: int | None
) -> tuple[list[Checkpoint], NewVocabulary]:
    """The models with the rows of the vocabulary that `spec` means.

    members  the first gives the config and the other side files; base: the number of the base model
    Raises   RecipeError, InputError, VocabMismatch, ShapeMismatch, MissingTensor"""
    labels = [member.label for member in members]
    found = [vocabulary_tensors(member.model, member.label) for member in members]
    names, sizes = [names for names, _ in found], [size for _, size in found]
    places = [member.folder for member in members]
    folders = {os.path.realpath(folder): folder for folder in places}
    loaded = {key: load_tokenizer(folder) for key, folder in folders.items()}
    tokenizers = [loaded[os.path.realpath(folder)] for folder in places]
    models = [tokens_of(tokenizer, label) for tokenizer, label in zip(tokenizers, labels, strict=True)]
    place = base if base is not None else 0
    tokenizer, folder = new_tokenizer(spec, members, place, tokenizers, models)
    tokens = tokens_of(tokenizer, "the merged model")
    check_without_holes(tokens, "the merged model")
    rules = {token: (rule, number_of(token, rule, members)) for token, rule in spec.tokens.items()}
    plans = plan_rows(tokens, Known(labels=labels, tokens=models, sizes=sizes), base, rules)
    rows = len(tokens) if spec.pad is None else math.ceil(len(tokens) / spec.pad) * spec.pad
    opened = [member.model for member in members]
    views = with_rows(opened, labels, names, sizes, plans, rows - len(tokens))
    text, how = chosen(template, folders.values()) if template is not None else (None, "")
    config, ids = members[0].model.config, Ids(models[0], tokens, special_ids(tokenizer))
    files = saved(tokenizer, text, safe_name(str(folder))) | ids.generation_config(members[0].folder)
    moved = ids.moved(config)
    said = [f"config.json: token ids as in the new vocabulary: {json.dumps(moved)}"] if moved else []
    return views, NewVocabulary(
        digest=digest_of(files_digest([*folders.values(), folder]), *map(repr, files.items())),
        summary=summary_of(spec, labels, len(tokens), rows, plans, how),
        notes=(*notes_of(spec, labels, len(tokens), rows, plans, how), *said),
        config=size_changes(config, sizes[0], rows) | moved,
        files=files,
        without=(*files, *TOKENIZER, "additional_chat_templates/*", *(("chat_template.json",) if text else ())),
    )


def new_tokenizer(
    spec: Vocabulary, members: Sequence[Member], place: int, tokenizers: Sequence[Any], models: Sequence[Vocab]
) -> tuple[Any, Path]:
    """The merged model's tokenizer, an object of its own, and the folder that it comes from."""
    folder = members[place].folder
    if isinstance(spec.source, ModelRef):
        same = [m.folder for m in members if spec.source.same_model(m.ref)]
        folder = same[0] if same else folder_of(spec.source)
    tokenizer = load_tokenizer(folder)
    if spec.source == "union":
        others = [*zip(tokenizers, models, strict=True)]
        joined(tokenizer, [others[place], *others[:place], *others[place + 1 :]])
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in spec.tokens if token not in known])
    return tokenizer, folder


def folder_of(ref: ModelRef) -> Path:
    path = (split_adapter(ref.local) or (ref.local,))[0]
    if ref.in_memory or not os.path.isdir(path):
        raise RecipeError(f"tokenizer: source: {safe_name(ref.path)}: must be a model's folder, union or base")
    return Path(path)


def number_of(token: str, rule: TokenRule, members: Sequence[Member]) -> int | None:
    if rule.model is None:
        return None
    for number, member in enumerate(members):
        if rule.model.same_model(member.ref):
            return number
    raise RecipeError(
        f"tokenizer: tokens: {safe_name(token)}: {safe_name(rule.model.path)} is not one of the merged models: "
        f"{', '.join(member.label for member in members)}"
    )


def digest_of(*texts: str | None) -> str:
    return hashlib.blake2b(json.dumps(texts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def summary_of(
    spec: Vocabulary, labels: Sequence[str], tokens: int, rows: int, plans: Sequence[RowPlan], template: str
) -> dict[str, Any]:
    models = {
        label: {**plan.counts, "from": {labels[j]: n for j, n in plan.counts["from"].items()}}
        for label, plan in zip(labels, plans, strict=True)
    }
    said = {"source": source_of(spec), "tokens": tokens, "rows": rows, "models": models}
    return said | ({"chat_template": template} if template else {})


def notes_of(
    spec: Vocabulary, labels: Sequence[str], tokens: int, rows: int, plans: Sequence[RowPlan], template: str
) -> tuple[str, ...]:
    padded = f", {rows} rows: those behind the tokens are the mean of the others" if rows > tokens else ""
    notes = [f"vocabulary ({source_of(spec)}): {tokens} tokens{padded}"]
    for label, plan in zip(labels, plans, strict=True):
        counts = plan.counts
        given = [f"{counts['own']} of its own"]
        given += [f"{n} from {labels[j]}" for j, n in counts["from"].items()]
        given += [f"{counts['mean']} means of other models"] if counts["mean"] else []
        given += [f"{counts['zero']} zero"] if counts["zero"] else []
        notes.append(f"rows of {label}: {', '.join(given)}")
    return (*notes, *((f"chat template: {template}",) if template else ()))


def source_of(spec: Vocabulary) -> str:
    return spec.source if isinstance(spec.source, str) else safe_name(spec.source.path)


def with_template(template: str, members: Sequence[Member]) -> NewVocabulary:
    """A chat template alone: tokenizer and weights stay as they are."""
    folders = list(dict.fromkeys(m.model.folder for m in members if m.model.folder is not None))
    text, how = chosen(template, folders)
    files = with_template_files(members[0].model.folder, text) if text is not None else {}
    return NewVocabulary(
        digest=digest_of(text),
        summary={"chat_template": how},
        notes=(f"chat template: {how}",),
        files=files,
        without=(*files, "chat_template.json", "additional_chat_templates/*") if files else (),
    )


def common_rows(members: Sequence[Member]) -> tuple[list[Checkpoint], NewVocabulary | None]:
    """The models with the vocabulary rows that all have; None where all have equally many."""
    models = [member.model for member in members]
    sizes = common_sizes(models, [member.label for member in members])
    if not sizes:
        return models, None
    rows = min(sizes)
    models = [truncated(model, size, rows) for model, size in zip(models, sizes, strict=True)]
    given = {member.label: size for member, size in zip(members, sizes, strict=True)}
    listed = ", ".join(f"{label} {size}" for label, size in given.items())
    note = (
        f"vocabulary sizes differ ({listed}): the first {rows} rows are kept, taken for the same tokens in all models"
    )
    return models, NewVocabulary(
        digest=digest_of(str(rows)),
        summary={"truncated": {"rows": rows, "models": given}},
        notes=(note,),
        config=size_changes(members[0].model.config, sizes[0], rows),
    )
