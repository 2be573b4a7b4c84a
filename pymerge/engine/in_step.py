"""Functions that stop at questions of their own run side by side, so that what all of them ask is answered at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

R = TypeVar("R")


class Stopped(Exception):
    """Another of the functions has failed."""


class InStep:
    """Runs each function in a thread of its own; when all that have not ended wait in `ask`, the caller of `run`
    answers all that they ask."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.asked: list[Any] = []
        self.active = 0  # functions that have not ended, and do not wait for what another one finds
        self.rounds = 0
        self.error: BaseException | None = None
        self.found: dict[Hashable, tuple[Any, ...]] = {}  # () while somebody is finding it
        self.waiting: dict[Hashable, int] = {}

    def run(self, functions: Sequence[Callable[[], object]], answer: Callable[[list[Any]], None]) -> None:
        """Until all have ended. answer: gets what was asked at once. The first error is raised, of whichever."""
        self.active = len(functions)
        threads = [threading.Thread(target=self._run, args=(function,), daemon=True) for function in functions]
        for thread in threads:
            thread.start()
        try:
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.error is not None or len(self.asked) == self.active)
                    asked, self.asked = self.asked, []
                if self.error is not None or not asked:
                    break
                answer(asked)
                with self.changed:
                    self.rounds += 1
                    self.changed.notify_all()
        except BaseException as error:
            self._fail(error)
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def ask(self, question: Any) -> None:
        """Called by the functions: returns when the question is answered."""
        with self.changed:
            asked_in = self.rounds
            self.asked.append(question)
            self.changed.notify_all()
            self._wait(lambda: self.rounds > asked_in)

    def once(self, key: Hashable, find: Callable[[], R]) -> R:
        """Called by the functions: what the first of them finds (it may ask) serves all with an equal key."""
        with self.changed:
            mine = key not in self.found
            if mine:
                self.found[key] = ()
            elif not self.found[key]:
                self.active -= 1  # counted again by the one that finds it
                self.waiting[key] = self.waiting.get(key, 0) + 1
                self.changed.notify_all()
                self._wait(lambda: self.found[key])
        if mine:
            found = find()
            with self.changed:
                self.found[key] = (found,)
                self.active += self.waiting.pop(key, 0)
                self.changed.notify_all()
        return self.found[key][0]

    def _wait(self, until: Callable[[], Any]) -> None:
        self.changed.wait_for(lambda: self.error is not None or until())
        if self.error is not None:
            raise Stopped

    def _run(self, function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            self._fail(error)
        with self.changed:
            self.active -= 1
            self.changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()
