"""Searches for hyperparameters: merge at a value, evaluate the model, go on with the next value."""

from pymerge.tuning.run import SearchResult, search

__all__ = ["SearchResult", "search"]
