"""Counts the rows of the list of faults that ran."""

from __future__ import annotations

import re

ROWS = {f"S{number:02}" for number in range(1, 51)}


def pytest_terminal_summary(terminalreporter) -> None:
    def rows(outcome: str) -> set[str]:
        reports = terminalreporter.stats.get(outcome, ())
        return {
            row for report in reports for row in re.findall(r"(?:test_|_)(S\d\d)(?=_)", getattr(report, "nodeid", ""))
        }

    passed, failed = rows("passed"), rows("failed") | rows("error")
    if passed or failed:
        absent = sorted(ROWS - passed - failed)
        said = ", ".join(absent) if len(absent) <= 10 else str(len(absent))
        terminalreporter.write_line(
            f"fault rows: {len(passed - failed)} of {len(ROWS)} passed; not run: {said or 'none'}"
        )
