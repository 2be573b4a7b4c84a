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


def plan_rows(
    tokens: Vocab,
    models: Sequence[Vocab],
    sizes: Sequence[int],
    labels: Sequence[str],
    base: int | None,
    rules: Mapping[str, tuple[TokenRule, int | None]],
) -> list[RowPlan]:
    """The rows of each model.

    tokens  of the merged model, in the order of their ids
    models  tokens of each model; sizes: rows that it has (a token behind them counts as absent)
    rules   token -> rule, number of the model that it names
    Raises  InputError: a rule's token is unknown to its source, or the rule names none and one is needed"""
    import numpy as np

    held = np.stack(
        [np.fromiter((vocab.get(t, -1) for t in tokens), np.int64, len(tokens)) for vocab in models]
    )  # [T, V]
    held[held >= np.array(sizes)[:, None]] = -1
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
        needed = rule.force or count[place] < len(models)
        try:
            donor[place], row[place] = ruled(token, rule, source, held[:, place], models, sizes, labels, needed)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return [rows_of(k, held, has & ~forced, has, donor, row, mean) for k in range(len(models))]


def ruled(
    token: str,
    rule: TokenRule,
    source: int | None,
    held: ndarray,
    models: Sequence[Vocab],
    sizes: Sequence[int],
    labels: Sequence[str],
    needed: bool,
) -> tuple[int, int]:
    """Model and row that a rule means; (-1, -1) for zeros, or where no model needs it."""
    where = f"tokenizer: tokens: {safe_name(token)}"
    if rule.kind == "zero" or not needed:
        return -1, -1
    if source is None:
        lacking = name_list([label for label, row in zip(labels, held, strict=True) if row < 0])
        raise InputError(f"{where}: has no source, and {lacking} lack it: give a model, {{kind: zero}} or model_token")
    if rule.kind == "own":
        found, what = int(held[source]), safe_name(token)
    elif isinstance(rule.token, str):
        found, what = models[source].get(rule.token, -1), safe_name(rule.token)
    else:
        found, what = int(rule.token or 0), f"token {rule.token}"
    if not 0 <= found < sizes[source]:
        raise InputError(f"{where}: {what} is unknown to its source {labels[source]}, which has {sizes[source]} rows")
    return source, found


def rows_of(k: int, held: ndarray, own: ndarray, has: ndarray, donor: ndarray, row: ndarray, mean: ndarray) -> RowPlan:
    """The rows of model k. held: row of each token in each model [T, V]; own: where it is used in the model itself."""
    import numpy as np

    lacks = ~own[k]
    shares, given = [], {}
    for j in range(len(held)):
        from_donor, in_mean = lacks & (donor == j), lacks & mean & has[j]
        used = from_donor | in_mean | (own[k] if j == k else False)
        places = np.flatnonzero(used)
        if len(places):
            shares.append(Share(j, places, np.where(from_donor, row, held[j])[places]))
        if from_donor.any():
            given[j] = int(from_donor.sum())
    zero = int((lacks & (donor < 0) & ~mean).sum())
    counts = {"own": int(own[k].sum()), "from": given, "mean": int((lacks & mean).sum()), "zero": zero}
    return RowPlan(tokens=held.shape[1], shares=tuple(shares), counts=counts)
