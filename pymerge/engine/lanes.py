"""What is in flight on a device: inputs that arrive while others are computed and results leave.

The caller's thread reads into page-locked memory and starts the copies (`Lane.stage`); the device's thread computes
(`Job.run`); a thread of the CPU waits for the results (`Job.finish`). Memory on either side is given back only there,
behind the last event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from pymerge.checkpoint import safe_name
from pymerge.engine.arena import Arena, Closed
from pymerge.engine.devices import DEVICE_SLACK, IN_FLIGHT, Backend, Device, Event, backend_of
from pymerge.errors import DeviceMemoryError

if TYPE_CHECKING:
    from pymerge.engine.piece import Piece

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
R = TypeVar("R")


class Place(Protocol):
    """Where pieces are computed."""

    def inputs(self, piece: Piece) -> list[Tensor]:
        """Flat tensors there, base first."""
        ...

    def put(self, piece: Piece, result: Tensor) -> None:
        """Takes a piece's output, in its dtype."""
        ...


class Host:
    """The CPU: it computes where the bytes are."""

    def inputs(self, piece: Piece) -> list[Tensor]:
        return host_inputs(piece)

    def put(self, piece: Piece, result: Tensor) -> None:
        host_output(piece).copy_(result.reshape(-1))


def host_inputs(piece: Piece) -> list[Tensor]:
    return [
        torch.frombuffer(view, dtype=DTYPES[dtype])
        for view, (_, dtype) in zip(piece.input_views, piece.inputs, strict=True)
    ]


def host_output(piece: Piece) -> Tensor:
    return torch.frombuffer(piece.out_view, dtype=DTYPES[piece.item.entry.dtype])


class Lanes:
    """The devices of a plan at work. Use as a context manager.

    arena  of page-locked memory, where what goes to a device is read"""

    def __init__(self, devices: Sequence[Device], pinned_bytes: int, host: Arena) -> None:
        self.arena = Arena(pinned_bytes, host)
        self.of = {device.name: Lane(device, self.arena) for device in devices if device.items}
        self.peaks: dict[str, int] = {}
        self.stack = ExitStack()

    def __enter__(self) -> Lanes:
        with ExitStack() as stack:
            stack.callback(self.arena.discard)
            backends = [lane.backend for lane in self.of.values()]
            for lane in self.of.values():
                stack.enter_context(lane.backend.limited(lane.device.budget))
            for backend in backends[:1]:  # page-locked for all devices
                backend.pin(self.arena.address, self.arena.size)
                stack.callback(backend.unpin, self.arena.address)
            for backend in backends:  # nothing may still be copied from or to memory that is given back
                stack.callback(backend.synchronize)
            self.stack = stack.pop_all()
        return self

    def summary(self) -> list[dict[str, Any]]:
        """What was planned, and what was taken in truth."""
        return [lane.device.plain() | {"taken_bytes": self.peaks[name]} for name, lane in self.of.items()]

    def __exit__(self, *exc: object) -> None:
        self.peaks = {name: lane.backend.peak_bytes() for name, lane in self.of.items()}
        self.stack.close()


class Lane:
    """One device and what is in flight there."""

    def __init__(self, device: Device, arena: Arena) -> None:
        self.device, self.arena = device, arena
        self.backend: Backend = backend_of(device.name)
        self.jobs: list[Job] = []

    def stage(self, pieces: Sequence[Piece]) -> Job:
        """Starts to copy the inputs of pieces that are merged as one; waits until there is room for them."""
        job = Job(self, pieces)
        with self.arena.changed:
            self.arena.changed.wait_for(lambda: self.arena.closed or self.has_room(job))
            if self.arena.closed:
                raise Closed("stopped")
            self.jobs.append(job)
        with self.explained(pieces):
            job.sent, job.arrived = self.backend.send([tensor for piece in pieces for tensor in host_inputs(piece)])
        return job

    def has_room(self, job: Job) -> bool:
        """Whether all that is in flight stays within what the plan says, one of them being computed."""
        jobs = [*self.jobs, job]
        taken = sum(one.resident for one in jobs) + max(one.workspace for one in jobs)
        return not self.jobs or (len(jobs) <= IN_FLIGHT and taken <= self.device.peak - DEVICE_SLACK)

    def finished(self, job: Job) -> None:
        with self.arena.changed:
            self.jobs.remove(job)
            self.arena.changed.notify_all()

    @contextmanager
    def explained(self, pieces: Sequence[Piece]) -> Iterator[None]:
        """A device out of memory, in words."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"{self.device.name} ran out of memory at {safe_name(pieces[0].item.entry.name)}: at most "
                f"{self.device.peak / 1e6:.0f} MB were to be taken there, {self.backend.free_bytes() / 1e6:.0f} MB are "
                "free now. A merge to disk keeps what is finished: when the device's other programs have ended, the "
                f"same command continues; or start anew with another --device ({error})"
            ) from error


class Job:
    """Pieces that are merged as one on a device; their `Place`."""

    def __init__(self, lane: Lane, pieces: Sequence[Piece]) -> None:
        self.lane, self.pieces = lane, pieces
        self.resident = sum(piece.item.resident_bytes(piece.count) for piece in pieces)
        self.workspace = sum(piece.item.workspace for piece in pieces)
        self.sent: list[Tensor] = []
        self.arrived: Event | None = None
        self.results: list[tuple[Tensor, Tensor]] = []
        self.left: Event | None = None

    def inputs(self, piece: Piece) -> list[Tensor]:
        at = 0
        for one in self.pieces:
            if one is piece:
                break
            at += len(one.inputs)
        return self.sent[at : at + len(piece.inputs)]

    def put(self, piece: Piece, result: Tensor) -> None:
        self.results.append((result.reshape(-1), host_output(piece)))

    def run(self, work: Callable[[], R]) -> R:
        """Computes there and starts to copy the results back."""
        assert self.arrived is not None
        with self.lane.explained(self.pieces), self.lane.backend.computing(self.arrived):
            found = work()
            self.left = self.lane.backend.fetch(self.results)
        return found

    def finish(self) -> None:
        """Waits until the results are here; what the device held of them is free."""
        assert self.left is not None
        self.left.synchronize()
        self.sent, self.results = [], []
        self.lane.finished(self)
