"""The arena hands out what it has, waits when it has not, and gets everything back."""

import random
import threading

import pytest

from pymerge.engine.arena import PAGE, Arena, Closed, Freed
from pymerge.errors import MergeError


def test_blocks_are_page_aligned_and_disjoint():
    arena = Arena(1 << 20)
    blocks = [arena.take(n) for n in (1, 5000, PAGE, 3 * PAGE + 1)]
    spans = sorted((b.start, b.start + b.size) for b in blocks)
    assert all(b.start % PAGE == 0 and b.size % PAGE == 0 for b in blocks)
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))


def test_everything_comes_back_in_any_order():
    arena = Arena(1 << 20)
    generator = random.Random(0)
    for _ in range(50):
        blocks = [arena.take(generator.randrange(1, 30_000)) for _ in range(generator.randrange(1, 20))]
        generator.shuffle(blocks)
        for block in blocks:
            block.release()
    assert arena.free == [(0, 1 << 20)]


def test_a_block_returns_after_its_last_holder():
    arena = Arena(2 * PAGE)
    block = arena.take(2 * PAGE)
    block.hold(1)
    block.release()
    assert arena.free == []
    block.release()
    assert arena.free == [(0, 2 * PAGE)]


def test_take_waits_for_release():
    arena = Arena(PAGE)
    block = arena.take(PAGE)
    got = []
    thread = threading.Thread(target=lambda: got.append(arena.take(PAGE)))
    thread.start()
    assert not got
    block.release()
    thread.join(10)
    assert len(got) == 1


def test_close_wakes_who_waits():
    arena = Arena(PAGE)
    arena.take(PAGE)
    raised = []

    def wait() -> None:
        with pytest.raises(Closed):
            arena.take(PAGE)
        raised.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    arena.close()
    thread.join(10)
    assert raised


def test_more_than_the_arena_is_an_error_not_a_wait():
    with pytest.raises(MergeError, match="arena"):
        Arena(PAGE).take(PAGE + 1)


def test_many_small_items_count_as_one_large():
    freed = Freed()
    freed.add(Freed.limit - 1)
    assert freed.bytes == Freed.limit - 1
    freed.add(1)
    assert freed.bytes == 0
