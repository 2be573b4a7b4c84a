"""`tokenizer_source`, `tokenizer` and `chat_template`: the vocabulary that the merged model gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from pymerge.recipe.models import ModelRef
from pymerge.recipe.problems import Problems

CHAT_TEMPLATES: Final = ("alpaca", "chatml", "exaone", "llama3", "mistral")
SOURCES: Final = ("union", "base")
MAX_TEMPLATE: Final = 1_000_000  # characters

Reference = Callable[[Any, str], ModelRef | None]  # of what a recipe says, and where


@dataclass(frozen=True, kw_only=True)
class TokenRule:
    """Where the row of a token comes from in models that lack it; with `force` in all of them.

    model     whose row it is; None where `kind` is "zero", or nothing is said
    token     another token of `model` whose row is taken, or its number
    """

    kind: Literal["own", "zero", "model_token"] = "own"
    model: ModelRef | None = None
    token: str | int | None = None
    force: bool = False

    def plain(self) -> dict[str, Any]:
        source: Any = self.model.path if self.model is not None else None
        if self.kind == "zero":
            source = {"kind": "zero"}
        elif self.kind == "model_token":
            source = {"kind": self.kind, "model": source, _key(self.token): self.token}
        return ({"source": source} if source is not None else {}) | ({"force": True} if self.force else {})


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """source  "union", "base", or the model whose tokenizer the merged model gets
    tokens  token -> where its row comes from; those that the tokenizer lacks are added
    pad     rows become a multiple of it"""

    source: str | ModelRef = "union"
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad: int | None = None

    def plain(self) -> dict[str, Any]:
        """The keys of a recipe that say it."""
        source = self.source if isinstance(self.source, str) else self.source.path
        if not self.tokens and self.pad is None:
            return {"tokenizer_source": source}
        tokens = {token: rule.plain() for token, rule in self.tokens.items()}
        given = {"tokens": tokens, "pad_to_multiple_of": self.pad}
        return {"tokenizer": {"source": source} | {key: value for key, value in given.items() if value}}


def parse_vocabulary(raw: Mapping[str, Any], reference: Reference, problems: Problems) -> Vocabulary | None:
    """`tokenizer_source: SOURCE` or `tokenizer: {source, tokens, pad_to_multiple_of}` of a recipe."""
    short, full = raw.get("tokenizer_source"), raw.get("tokenizer")
    if short is not None and full is not None:
        problems.add("tokenizer", "give tokenizer_source or tokenizer, not both")
        return None
    if short is not None:
        return Vocabulary(source=_source(short, "tokenizer_source", reference))
    if full is None:
        return None
    if not isinstance(full, Mapping):
        problems.add("tokenizer", f"must be {{source, tokens, pad_to_multiple_of}}, got {full!r}")
        return None
    known = ("source", "tokens", "pad_to_multiple_of")
    for key in full:
        if key not in known:
            problems.unknown("tokenizer", key, known)
    pad = full.get("pad_to_multiple_of")
    if pad is not None and (isinstance(pad, bool) or not isinstance(pad, int) or not 1 <= pad <= 1 << 20):
        problems.add("tokenizer: pad_to_multiple_of", f"must be a whole number from 1 to {1 << 20}, got {pad!r}")
        pad = None
    source = full.get("source")
    return Vocabulary(
        source="union" if source is None else _source(source, "tokenizer: source", reference),
        tokens=_tokens(full.get("tokens"), reference, problems),
        pad=pad,
    )


def _source(raw: Any, where: str, reference: Reference) -> str | ModelRef:
    return raw if raw in SOURCES else reference(raw, where) or "base"  # what is no model has been noted


def _tokens(raw: Any, reference: Reference, problems: Problems) -> dict[str, TokenRule]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        problems.add("tokenizer: tokens", f"must be {{TOKEN: {{source: ..., force: ...}}}}, got {raw!r}")
        return {}
    return {str(token): _rule(token, rule, reference, problems) for token, rule in raw.items()}


def _rule(token: Any, raw: Any, reference: Reference, problems: Problems) -> TokenRule:
    where = f"tokenizer: tokens: {token!r}"
    if not isinstance(token, str) or not token:
        problems.add(where, "a token is text: put it into quotes")
    if not isinstance(raw, Mapping):
        problems.add(where, f"must be {{source: ..., force: ...}}, got {raw!r}")
        return TokenRule()
    for key in raw:
        if key not in ("source", "force"):
            problems.unknown(where, key, ("source", "force"))
    force, source = raw.get("force", False), raw.get("source")
    if not isinstance(force, bool):
        problems.add(where, f"force: must be true or false, got {force!r}")
    if source is None:
        if force is True:
            problems.add(where, "force needs a source: a model, {kind: zero} or {kind: model_token, ...}")
        return TokenRule()
    if not isinstance(source, Mapping) or "kind" not in source:
        return TokenRule(model=reference(source, f"{where}: source"), force=force is True)
    return _of_kind(source, f"{where}: source", force is True, reference, problems)


def _of_kind(source: Mapping[str, Any], where: str, force: bool, reference: Reference, problems: Problems) -> TokenRule:
    kind = source["kind"]
    if kind not in ("zero", "model_token"):
        problems.unknown(where, kind, ("zero", "model_token"), "kind")
        return TokenRule()
    known = ("kind",) if kind == "zero" else ("kind", "model", "token", "token_id")
    for key in source:
        if key not in known:
            problems.unknown(where, key, known)
    if kind == "zero":
        return TokenRule(kind="zero", force=force)
    given = [source[key] for key in ("token", "token_id") if source.get(key) is not None]
    token = given[0] if len(given) == 1 else None
    wanted = str if source.get("token") is not None else int
    if not isinstance(token, wanted) or isinstance(token, bool) or (isinstance(token, int) and token < 0):
        problems.add(where, "needs either token (text) or token_id (a whole number from 0)")
        token = None
    model = reference(source.get("model"), f"{where}: model")
    return TokenRule(kind="model_token", model=model, token=token, force=force)


def _key(token: str | int | None) -> str:
    return "token" if isinstance(token, str) else "token_id"


def parse_chat_template(raw: Any, problems: Problems) -> str | None:
    """`auto`, a name of CHAT_TEMPLATES, or the text of a Jinja template."""
    if raw is None:
        return None
    if not isinstance(raw, str) or len(raw) > MAX_TEMPLATE:
        problems.add("chat_template", f"must be text of at most {MAX_TEMPLATE} characters")
        return None
    if "{" not in raw and raw not in ("auto", *CHAT_TEMPLATES):
        problems.unknown("chat_template", raw, ("auto", *CHAT_TEMPLATES), "template")
    return raw
