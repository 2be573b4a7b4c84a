"""Counts the code blocks of README and docs, and says which are not run, and why."""

from __future__ import annotations


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, ())]
    blocks = [
        b for r in reports for key, value in getattr(r, "user_properties", ()) if key == "code_blocks" for b in value
    ]
    if not blocks:
        return
    silent, elsewhere = [b for b in blocks if b.not_run], [b for b in blocks if b.run_by]
    here = len(blocks) - len(silent) - len(elsewhere)
    terminalreporter.write_line(
        f"code blocks of README and docs: {here} run here, {len(elsewhere)} by other tests, {len(silent)} not run:"
    )
    for block in silent:
        terminalreporter.write_line(f"  {block.place}: {block.not_run}")
