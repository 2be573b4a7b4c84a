"""A CUDA device as the engine uses it: the only place of streams, events and page-locked memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pymerge.engine.devices import Event

PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device


class CudaBackend:
    """`Backend` of pymerge.engine.devices.

    No tensor is told which streams use it (record_stream): whoever sends and fetches keeps tensors until the last event
    is over, and a step's own tensors are made, used and freed on one stream."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self.copies, self.computes = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        self.before = 0  # bytes that were allocated when the merge began

    @classmethod
    def count(cls) -> int:
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    @contextmanager
    def limited(self, nbytes: int) -> Iterator[None]:
        total = torch.cuda.get_device_properties(self.device).total_memory
        fraction = torch.cuda.get_per_process_memory_fraction(self.device)
        allowed = (torch.cuda.memory_reserved(self.device) + nbytes) / total
        self.before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        torch.cuda.set_per_process_memory_fraction(min(fraction, allowed), self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(fraction, self.device)
            torch.cuda.empty_cache()  # a merge that comes next in this process asks what is free

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.before

    def pin(self, address: int, nbytes: int) -> None:
        check("cudaHostRegister", address, nbytes, PORTABLE)

    def unpin(self, address: int) -> None:
        check("cudaHostUnregister", address)

    def send(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        with torch.cuda.stream(self.copies):
            sent = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
            return sent, recorded(self.copies)

    @contextmanager
    def computing(self, behind: Any) -> Iterator[None]:
        with torch.cuda.stream(self.computes):
            self.computes.wait_event(behind)
            yield

    def fetch(self, results: Sequence[tuple[Tensor, Tensor]]) -> Event:
        computed = recorded(self.computes)
        with torch.cuda.stream(self.copies):
            self.copies.wait_event(computed)
            for result, place in results:
                place.copy_(result, non_blocking=True)
            return recorded(self.copies)

    def synchronize(self) -> None:
        self.copies.synchronize()
        self.computes.synchronize()


def recorded(stream: torch.cuda.Stream) -> Any:
    """An event behind all that the stream has been given. Waiting for it takes no processor."""
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event


def check(function: str, *arguments: int) -> None:
    """Calls a function of the CUDA runtime."""
    runtime: Any = torch.cuda.cudart()
    if code := int(getattr(runtime, function)(*arguments)):
        raise RuntimeError(f"{function}: {runtime.cudaGetErrorString(runtime.cudaError(code))}")
