"""The code blocks of a page of Markdown, in order, with the marks that HTML comments put on them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"( *)(```+|~~~+) *([\w+-]*)")
MARK = re.compile(r"<!-- (not run|run by|first):\s(.*?)\s*-->", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block.

    language  of the fence; "console" for an indented block
    section   the last heading of two `#` before it
    not_run   why it is not executed; "" where it is
    run_by    the test that executes it in place of this collector; "" where none does
    first     Python that is executed before it, and that readers do not see
    """

    page: str
    line: int
    language: str
    text: str
    section: str = ""
    not_run: str = ""
    run_by: str = ""
    first: str = ""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str:
        """The name of the file that its first line says it is ("# evaluate.py"), or ""."""
        found = re.match(r"# ([\w.-]+\.(?:py|ya?ml|jsonl))\b(?![/(])", self.text)
        return found[1] if found else ""


def blocks_of(page: Path, root: Path) -> list[Block]:
    return blocks_in(page.read_text(), str(page.relative_to(root)))


def blocks_in(text: str, page: str) -> list[Block]:
    """All fenced blocks but those in the language "text", and all blocks indented by four spaces outside of lists.

    A comment `<!-- not run: REASON -->`, `<!-- run by: tests/x.py -->` or `<!-- first: PYTHON -->` belongs to the block
    that follows it."""
    lines, found = text.split("\n"), []
    marks: dict[str, str] = {}
    i, in_list, section = 0, False, ""
    while i < len(lines):
        start = i
        if fence := FENCE.match(lines[i]):
            end, language = _end_of(lines, i, lambda line: line.strip().startswith(fence[2]), page), fence[3]
            body, i = [row[len(fence[1]) :] for row in lines[i + 1 : end]], end + 1
        elif lines[i].startswith("<!--"):
            i = _end_of(lines, i - 1, lambda line: "-->" in line, page) + 1
            if mark := MARK.match("\n".join(lines[start:i])):
                marks[mark[1].replace(" ", "_")] = mark[2]
            continue
        elif lines[i].startswith("    ") and not in_list:
            while i < len(lines) and (lines[i].startswith("    ") or not lines[i].strip()):
                i += 1
            body, language = [row[4:] for row in lines[start:i]], "console"
        else:
            if lines[i].strip() and not lines[i].startswith(" "):
                in_list = bool(re.match(r"([-*+]|\d+\.) ", lines[i]))
            if lines[i].startswith("## "):
                section = lines[i][3:]
            i += 1
            continue
        if language != "text":
            code = "\n".join(body).rstrip() + "\n"
            found.append(Block(page=page, line=start + 1, language=language, text=code, section=section, **marks))
        marks = {}
    if marks:
        raise ValueError(f"{page}: a mark without a block behind it: {marks}")
    return found


def _end_of(lines: list[str], start: int, ends: Callable[[str], bool], page: str) -> int:
    """The first line behind `start` where what began there ends."""
    for i in range(start + 1, len(lines)):
        if ends(lines[i]):
            return i
    raise ValueError(f"{page}:{start + 1}: what begins here has no end")
