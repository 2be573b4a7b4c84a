"""Searches for hyperparameters: merge at a value, evaluate the model, go on with the next value."""

from pymerge.tuning.evaluate import Evaluation
from pymerge.tuning.record import Try
from pymerge.tuning.run import SearchResult, search

__all__ = ["Evaluation", "SearchResult", "Try", "search"]
