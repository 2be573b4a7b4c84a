"""Reading over the network: blocks of remote files, fetched by several threads ahead of the reader, within a bound of
memory.

A file is cut into blocks from its first byte of data on. Who reads a range has all its blocks fetched at once, as far
as there is room; who reads on where it stopped before, finds the next ones on their way. Blocks that were read past
make room for others, the longest unused first, so whoever reads files from front to back has each byte fetched once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

from pymerge.errors import InputError

REQUESTS = 10  # in flight at once: as many connections as the S3 library keeps
LARGEST_BLOCK = 8 << 20  # from here on a request costs little beside its bytes
SMALLEST_BLOCK = 1 << 16
USUAL = 64 << 20  # bytes, until a plan says otherwise
PATIENCE = 0.25  # seconds after which a wait looks whether it is to end


class Source(Protocol):
    """A remote file. origin: where its data begins; position: where it was last read up to."""

    origin: int
    size: int
    position: int

    def fetch(self, begin: int, end: int) -> bytes: ...


@dataclass
class Block:
    source: Source
    begin: int
    end: int
    data: Future[bytes]


class Fetchers:
    """Threads that fetch blocks, from the first one on. A program that ends does not wait for them."""

    def __init__(self) -> None:
        self.asked: SimpleQueue[Block] = SimpleQueue()
        self.threads: list[threading.Thread] = []

    def submit(self, block: Block) -> None:
        if not self.threads:
            self.threads = [threading.Thread(target=self.work, daemon=True) for _ in range(REQUESTS)]
            for thread in self.threads:
                thread.start()
        self.asked.put(block)

    def work(self) -> None:
        while True:
            block = self.asked.get()
            if block.data.set_running_or_notify_cancel():
                try:
                    block.data.set_result(block.source.fetch(block.begin, block.end))
                except BaseException as error:
                    block.data.set_exception(error)
            del block  # or its bytes would stay until the next one is asked for


class Blocks:
    """The blocks of all remote files that are open. For any number of threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.fetchers = Fetchers()
        self.held: OrderedDict[tuple[int, int], Block] = OrderedDict()  # least recently used first
        self.interrupted = False
        self.plan(USUAL, 1)

    def plan(self, limit: int, streams: int) -> None:
        """Use at most `limit` bytes, for so many files that are read side by side.

        Each of them may have one block half read and `ahead` blocks waiting; the one that is being read has the rest.
        While a block arrives the library that fetches it may hold it twice."""
        with self.lock:
            self.ahead = max(1, REQUESTS // max(1, streams))
            self.most = max(1, streams) * (self.ahead + 1) + REQUESTS
            size = limit // (self.most + REQUESTS) // SMALLEST_BLOCK * SMALLEST_BLOCK
            self.size = max(SMALLEST_BLOCK, min(LARGEST_BLOCK, size))
            self.held.clear()  # not cancelled: other threads may wait for some

    def read_into(self, source: Source, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on, all of them data of the file."""
        end, size = offset + view.nbytes, self.size
        goes_on = source.position <= offset <= source.position + size
        until = min(source.size, end + (self.ahead * size if goes_on else 0))
        at = offset
        while at < end:
            block = self.wanted(source, source.origin + (at - source.origin) // size * size, until, size)
            try:
                data = self.arrived(block)
            except BaseException:
                with self.lock:
                    self.forget([(id(source), block.begin)])
                raise
            part = memoryview(data)[at - block.begin : end - block.begin]
            view[at - offset : at - offset + len(part)] = part
            at += len(part)
            source.position = at

    def arrived(self, block: Block) -> bytes:
        while True:
            try:
                return block.data.result(PATIENCE)
            except TimeoutError:
                if self.interrupted:
                    raise InputError("stopped while a block was on its way") from None

    def interrupt(self, stopped: bool = True) -> None:
        """Whether those who wait for a block are to give up."""
        self.interrupted = stopped

    def wanted(self, source: Source, begin: int, until: int, size: int) -> Block:
        """The block that begins there, on its way like those behind it up to `until` for which there is room."""
        with self.lock:
            key = (id(source), begin)
            if key not in self.held:
                self.make_room(needed=True)
                self.held[key] = self.started(source, begin, size)
            self.held.move_to_end(key)
            for following in range(begin + size, until, size):
                if (id(source), following) not in self.held:
                    if not self.make_room(needed=False):
                        break
                    self.held[id(source), following] = self.started(source, following, size)
            return self.held[key]

    def started(self, source: Source, begin: int, size: int) -> Block:
        end = min(begin + size, source.size)
        block = Block(source, begin, end, Future())
        self.fetchers.submit(block)
        return block

    def make_room(self, *, needed: bool) -> bool:
        """Room for one more block: what was passed by goes first; what waits to be read only where it is needed."""
        while len(self.held) >= self.most:
            done = [(key, block) for key, block in self.held.items() if block.data.done()]
            passed = next((key for key, block in done if block.end <= block.source.position), None)
            key = passed or (done[0][0] if done and needed else None)
            if key is None:
                return needed
            self.forget([key])
        return True

    def drop(self, source: Source) -> None:
        """Nothing more of this file is asked for."""
        with self.lock:
            self.forget([key for key in self.held if key[0] == id(source)])

    def forget(self, keys: list[tuple[int, int]]) -> None:
        for key in keys:
            block = self.held.pop(key, None)
            if block is not None:
                block.data.cancel()


BLOCKS = Blocks()
