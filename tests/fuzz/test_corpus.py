"""Every file of the fuzzer's corpus, seeds and what once failed, without the fuzzer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import targets

CORPUS = Path(__file__).parent / "corpus"
FILES = sorted(path for path in CORPUS.rglob("*") if path.is_file())


def test_every_target_has_seeds() -> None:
    assert {path.parent.name for path in FILES} == set(targets.TARGETS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_strangers_file_is_accepted_or_refused(path: Path) -> None:
    targets.run(path.parent.name, path.read_bytes())


def test_what_is_accepted_and_what_is_not() -> None:
    accepted = {t: sum(targets.run(t, p.read_bytes()) for p in FILES if p.parent.name == t) for t in targets.TARGETS}
    total = {target: len([p for p in FILES if p.parent.name == target]) for target in targets.TARGETS}
    assert all(0 < accepted[t] < total[t] or t == "journal" for t in targets.TARGETS), accepted
