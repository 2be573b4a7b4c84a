"""`python -m pymerge`, as the command `pymerge`."""

from pymerge.cli import main

main()
