"""The command line; each module has the commands of one kind."""

from pymerge.cli import demonstrating, inspecting, looking, merging, preparing, searching, sweeping
from pymerge.cli.app import app

__all__ = ["app", "demonstrating", "inspecting", "looking", "main", "merging", "preparing", "searching", "sweeping"]


def main() -> None:
    """Entry point of the `pymerge` command."""
    app()
