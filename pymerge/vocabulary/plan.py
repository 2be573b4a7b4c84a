"""Which row of which model becomes which row: the merged vocabulary against the vocabulary of each model.

A model's own row comes first. A token that some models lack gets one row for these: that of its rule; else of the only
model that has it; else of the base; else the mean of those that have it; zeros where no model has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint import safe_name
from pymerge.checkpoint.header import name_list
from pymerge.errors import InputError
from pymerge.recipe.tokenizer import TokenRule
from pymerge.vocabulary.tokenizers import Vocab

if TYPE_CHECKING:
    from numpy import ndarray


@dataclass(frozen=True)
class Share:
    """What one model gives: its rows index[i] at places[i]. int64 [n], places ascending."""

    model: int
    places: ndarray
    index: ndarray


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """The rows of one model: the mean of what its shares put there.

    counts  {"own": n, "from": {number of a model: n}, "mean": n, "zero": n}"""

    tokens: int
    shares: tuple[Share, ...]
    counts: Mapping[str, Any]

    def keeps(self, model: int, rows: int) -> bool:
        """Whether the model's rows stay as they are."""
        import numpy as np

        if self.tokens != rows or [share.model for share in self.shares] != [model]:
            return False
        return np.array_equal(self.shares[0].index, np.arange(rows))


@dataclass(frozen=True, kw_only=True)
class Known:
    """The models: what they are called, their tokens, how many rows they have."""

    labels: Sequence[str]
    tokens: Sequence[Vocab]
    sizes: Sequence[int]

    def held(self, tokens: Vocab) -> ndarray:
        """Rows of the tokens in each model, int64 [T, V]; -1 where it has no such token or the row is not there."""
        import numpy as np

        rows = [np.fromiter((vocab.get(t, -1) for t in tokens), np.int64, len(tokens)) for vocab in self.tokens]
        return np.stack([np.where(row < size, row, -1) for row, size in zip(rows, self.sizes, strict=True)])


def plan_rows(
    tokens: Vocab, models: Known, base: int | None, rules: Mapping[str, tuple[TokenRule, int | None]]
) -> list[RowPlan]:
    """The rows of each model.

    tokens  of the merged model, in the order of their ids
    rules   token -> rule, number of the model that it names
    Raises  InputError: a rule's token is unknown to its source, or the rule names none and one is needed"""
    import numpy as np

    held = models.held(tokens)
    has = held >= 0
    count = has.sum(0)
    donor = np.where(count == 1, has.argmax(0), -1)  # whose row models get that lack it
    if base is not None:
        donor[has[base] & (count > 0)] = base
    mean = (donor < 0) & (count > 1)
    row = np.where(donor >= 0, np.take_along_axis(held, donor.clip(0)[None], 0)[0], -1)
    forced = np.zeros(len(tokens), bool)
    problems = []
    for token, (rule, source) in rules.items():
        place = tokens[token]
        forced[place], mean[place] = rule.force, False
        try:
            donor[place], row[place] = ruled(token, rule, source, held[:, place], models)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return [rows_of(k, held, has[k] & ~forced, donor, row, mean) for k in range(len(held))]


def ruled(token: str, rule: TokenRule, source: int | None, held: ndarray, models: Known) -> tuple[int, int]:
    """Model and row that a rule means; (-1, -1) for zeros, or where no model needs it. held: the token's rows [T]."""
    where = f"tokenizer: tokens: {safe_name(token)}"
    if rule.kind == "zero" or not (rule.force or (held < 0).any()):
        return -1, -1
    if source is None:
        lacking = name_list([label for label, row in zip(models.labels, held, strict=True) if row < 0])
        raise InputError(f"{where}: has no source, and {lacking} lack it: give a model, {{kind: zero}} or model_token")
    if rule.kind == "own":
        found, what = int(held[source]), safe_name(token)
    elif isinstance(rule.token, str):
        found, what = models.tokens[source].get(rule.token, -1), safe_name(rule.token)
    else:
        found, what = int(rule.token or 0), f"token {rule.token}"
    label, size = models.labels[source], models.sizes[source]
    if not 0 <= found < size:
        raise InputError(f"{where}: {what} is unknown to its source {label}, which has {size} rows")
    return source, found


def rows_of(k: int, held: ndarray, own: ndarray, donor: ndarray, row: ndarray, mean: ndarray) -> RowPlan:
    """The rows of model k. held: row of each token in each model [T, V]; own: where it uses that of its own [V]."""
    import numpy as np

    lacks = ~own
    shares, given = [], {}
    for j in range(len(held)):
        from_donor, in_mean = lacks & (donor == j), lacks & mean & (held[j] >= 0)
        used = from_donor | in_mean | (own if j == k else False)
        places = np.flatnonzero(used)
        if len(places):
            shares.append(Share(j, places, np.where(from_donor, row, held[j])[places]))
        if from_donor.any():
            given[j] = int(from_donor.sum())
    zero = int((lacks & (donor < 0) & ~mean).sum())
    counts = {"own": int(own.sum()), "from": given, "mean": int((lacks & mean).sum()), "zero": zero}
    return RowPlan(tokens=held.shape[1], shares=tuple(shares), counts=counts)
