"""A device for tests that does everything as late as it may: a copy is made when an event behind it is waited for, not
before. What does not wait computes with, or writes, bytes that are not there yet; and who gives memory back too early
is told so.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock

import torch
from torch import Tensor


class FakeEvent:
    def __init__(self, device: FakeBackend) -> None:
        self.device, self.behind = device, device.started

    def synchronize(self) -> None:
        self.device.copy_until(self.behind)


class FakeBackend:
    """`Backend` on the CPU. Class attributes are set by tests; `made` holds all that were opened, in order."""

    devices = 2
    free = 1 << 40
    out_of_memory_at = -1  # number of a copy to a device that fails, over all devices
    made: list[FakeBackend]
    sends: int

    def __init__(self, index: int) -> None:
        self.index = index
        self.lock = RLock()
        self.pending: deque[Callable[[], None]] = deque()
        self.started = self.copied = 0
        self.allocated = self.peak = 0
        self.limit: int | None = None
        self.pinned: dict[int, int] = {}
        self.log: list[str] = []
        self.made.append(self)

    @classmethod
    def count(cls) -> int:
        return cls.devices

    def free_bytes(self) -> int:
        return self.free

    @contextmanager
    def limited(self, nbytes: int) -> Iterator[None]:
        self.limit = nbytes
        yield
        self.log.append("unlimited")

    def peak_bytes(self) -> int:
        return self.peak

    def pin(self, address: int, nbytes: int) -> None:
        self.pinned[address] = nbytes

    def unpin(self, address: int) -> None:
        assert not self.pending, "memory is given back while copies are under way"
        del self.pinned[address]

    def send(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], FakeEvent]:
        type(self).sends += 1
        if self.sends == self.out_of_memory_at:
            raise torch.OutOfMemoryError("fake device out of memory")
        with self.lock:
            self.log.append("send")
            sent = [self.allocate(torch.full_like(tensor, float("nan"))) for tensor in tensors]
            for tensor, copy in zip(tensors, sent, strict=True):
                self.start(tensor, copy, tensor.clone())
            return sent, FakeEvent(self)

    @contextmanager
    def computing(self, behind: FakeEvent) -> Iterator[None]:
        behind.synchronize()
        self.log.append("compute")
        yield

    def fetch(self, results: Sequence[tuple[Tensor, Tensor]]) -> FakeEvent:
        with self.lock:
            self.log.append("fetch")
            for result, place in results:
                self.start(self.allocate(result), place, result.clone())
            return FakeEvent(self)

    def synchronize(self) -> None:
        self.copy_until(self.started)

    # what goes on inside

    def allocate(self, tensor: Tensor) -> Tensor:
        self.allocated += tensor.nbytes
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(tensor, self.freed, tensor.nbytes)
        return tensor

    def freed(self, nbytes: int) -> None:
        self.allocated -= nbytes

    def start(self, source: Tensor, target: Tensor, expected: Tensor) -> None:
        """A copy to be made; on the device's side nothing is kept alive by it."""
        on_device = weakref.ref(target if self.log[-1] == "send" else source)
        host = source if self.log[-1] == "send" else target
        to_device = self.log[-1] == "send"

        def copy() -> None:
            device = on_device()
            assert device is not None, "device memory was freed before the event behind its copy"
            now = host if to_device else device
            same = torch.equal(now.view(torch.uint8), expected.view(torch.uint8))
            assert same, "a buffer was used again before the event behind its copy"
            (device if to_device else host).copy_(expected)

        self.started += 1
        self.pending.append(copy)

    def copy_until(self, number: int) -> None:
        with self.lock:
            while self.copied < number:
                self.copied += 1
                self.pending.popleft()()


def fake_devices() -> tuple[type[FakeBackend], Callable[..., object]]:
    """A class of devices of its own, and what pymerge.engine.devices.BACKENDS is given for it."""

    class Devices(FakeBackend):
        made: list[FakeBackend] = []
        sends = 0

    return Devices, lambda index=None: Devices if index is None else Devices(index)
