"""Everything submitted is written once; the first error stops the rest and reaches the caller."""

import threading

import pytest

from pymerge.engine.arena import Arena
from pymerge.engine.pipeline import Output, Pipeline, Segment


def test_everything_is_written():
    arena, written, lock = Arena(1 << 16), [], threading.Lock()

    def write(segment: Segment) -> None:
        with lock:
            written.append((segment.name, bytes(segment.view)))

    with Pipeline(arena, 2, write) as pipeline:
        for i in range(200):
            block = arena.take(4096)
            block.view[:4] = i.to_bytes(4, "little")
            pipeline.submit(lambda b=block, i=i: Output(b, [Segment(str(i), 0, b.view[:4], 0)]))
        pipeline.drain()
    assert sorted(written) == sorted((str(i), i.to_bytes(4, "little")) for i in range(200))
    assert arena.free == [(0, 1 << 16)]


@pytest.mark.parametrize("where", ["compute", "write"])
def test_the_first_error_reaches_the_caller(where):
    arena = Arena(1 << 16)

    def write(segment: Segment) -> None:
        if where == "write":
            raise OSError("disk full")

    def compute(block):
        if where == "compute":
            raise ValueError("bad numbers")
        return Output(block, [Segment("x", 0, block.view[:4], 0)])

    with pytest.raises((OSError, ValueError), match="disk full|bad numbers"):
        with Pipeline(arena, 2, write) as pipeline:
            block = arena.take(4096)
            pipeline.submit(lambda: compute(block))
            pipeline.drain()


def test_work_may_submit_work_that_comes_first():
    arena, order = Arena(1 << 16), []
    with Pipeline(arena, 1, lambda segment: None) as pipeline:

        def parent() -> None:
            pipeline.submit(lambda: order.append("child"), first=True)
            order.append("parent")

        gate = threading.Event()
        pipeline.submit(lambda: gate.wait(10) and None)
        pipeline.submit(parent)
        pipeline.submit(lambda: order.append("later"))
        gate.set()
        pipeline.drain()
    assert order == ["parent", "child", "later"]
