"""Misspelt names."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(name: object, known: Iterable[str]) -> str:
    """What to write instead: the nearest valid names, or all of them."""
    import difflib  # only errors need it

    known = list(known)
    word = str(name).lower().replace("-", "_")
    spellings = (word, word.removeprefix("pymerge_"))  # with which methods are called inside mergekit
    found = (difflib.get_close_matches(spelling, known, n=3, cutoff=0.6) for spelling in spellings)
    near = next(filter(None, found), [])
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known) or 'none'}"
