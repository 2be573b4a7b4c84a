"""Where tables for people are printed."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console

WIDE = 160  # columns of a file or a pipe: nothing in it is cut


def standard_output(**settings: Any) -> Console:
    """As wide as the terminal or as COLUMNS says; anything else is wide enough for every table."""
    found = Console(highlight=False, **settings)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = WIDE
    return found
