"""Misspelt names."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(name: object, known: Iterable[str]) -> str:
    """What to write instead: the nearest valid names, or all of them."""
    import difflib  # only errors need it

    known = list(known)
    word = str(name).lower().replace("-", "_").removeprefix("pymerge_")  # as methods are called inside mergekit
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known) or 'none'}"
