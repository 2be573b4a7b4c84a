"""Functions that ask: what all ask at once is answered at once, what one finds serves all, an error ends all."""

from __future__ import annotations

import pytest

from pymerge.engine.in_step import InStep


def asking(step: InStep, name: str, times: int):
    def run() -> None:
        for n in range(times):
            step.ask((name, n))

    return run


def test_questions_are_answered_together_until_all_have_ended() -> None:
    step, rounds = InStep(), []
    functions = [asking(step, "a", 1), asking(step, "b", 3), asking(step, "c", 0), asking(step, "d", 2)]
    step.run(functions, lambda asked: rounds.append(sorted(asked)))
    assert rounds == [[("a", 0), ("b", 0), ("d", 0)], [("b", 1), ("d", 1)], [("b", 2)]]


def test_what_one_finds_serves_all() -> None:
    step, rounds, found = InStep(), [], []

    def find() -> int:
        step.ask("shared")
        return len(rounds)

    def run() -> None:
        step.ask("own")
        found.append(step.once("key", find))
        found.append(step.once("key", find))

    step.run([run] * 3, rounds.append)
    assert rounds == [["own"] * 3, ["shared"]] and found == [2] * 6


def test_an_error_of_a_function_ends_all() -> None:
    step = InStep()

    def fails() -> None:
        raise ValueError("mine")

    def finds() -> int:
        step.ask("never answered, for the others wait for it")
        raise AssertionError

    waits = [lambda: step.once("key", finds)] * 2
    with pytest.raises(ValueError, match="mine"):
        step.run([*waits, asking(step, "a", 100), fails], lambda asked: None)


def test_an_error_of_an_answer_ends_all() -> None:
    def fail(asked: list[object]) -> None:
        raise KeyboardInterrupt

    step = InStep()
    with pytest.raises(KeyboardInterrupt):
        step.run([asking(step, "a", 2), asking(step, "b", 1)], fail)
