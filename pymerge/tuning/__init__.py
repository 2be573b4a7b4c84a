"""Searches for hyperparameters (merge at a value, evaluate, go on with the next value) and sweeps over many at once."""

from pymerge.tuning.grid import SweepResult, sweep
from pymerge.tuning.run import SearchResult, search

__all__ = ["SearchResult", "SweepResult", "search", "sweep"]
