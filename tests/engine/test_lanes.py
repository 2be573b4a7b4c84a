"""What is in flight on a device: nothing is used before it is there, or given back before it is done with."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from pymerge.engine.arena import Arena, Closed
from pymerge.engine.devices import BACKENDS, DEVICE_SLACK, IN_FLIGHT, Device
from pymerge.engine.lanes import Lane, Lanes
from tests.engine.fake_device import FakeBackend, fake_devices


@pytest.fixture
def fakes(monkeypatch) -> type[FakeBackend]:
    found, backend = fake_devices()
    monkeypatch.setitem(BACKENDS, "fake", backend)
    return found


class Fake(SimpleNamespace):
    """A piece, as a lane sees it: one input and one output in an arena's block."""


def piece(lane: Lane, values: list[float], workspace: int = 0) -> Fake:
    block = lane.arena.take(8 * len(values))
    half = 4 * len(values)
    torch.frombuffer(block.view[:half], dtype=torch.float32).copy_(torch.tensor(values))
    item = SimpleNamespace(
        workspace=workspace, resident_bytes=lambda n: 8 * n, entry=SimpleNamespace(name="x", dtype="F32")
    )
    return Fake(
        item=item,
        count=len(values),
        inputs=((block.address, "F32"),),
        input_views=(block.view[:half],),
        out_view=block.view[half : 2 * half],
    )


def lanes_of(fakes, room: int) -> Lanes:
    device = Device(name="fake:0", budget=1 << 40, peak=DEVICE_SLACK + room, items=1)
    return Lanes([device], 1 << 20, Arena(4096))


def doubled(job) -> None:
    for one in job.pieces:
        (x,) = job.inputs(one)
        job.put(one, x * 2)


def values_of(one) -> list[float]:
    return torch.frombuffer(one.out_view, dtype=torch.float32).tolist()


def test_inputs_are_sent_while_others_are_computed_and_results_wait_for_their_event(fakes):
    with lanes_of(fakes, 1000) as lanes:
        lane = lanes.of["fake:0"]
        first, second = piece(lane, [1.0, 2.0]), piece(lane, [3.0, 4.0])
        jobs = [lane.stage([first]), lane.stage([second])]
        assert not jobs[1].sent[0].isfinite().any()  # under way
        jobs[0].run(lambda: doubled(jobs[0]))
        assert values_of(first) == [0.0, 0.0]  # not here before its event
        jobs[1].run(lambda: doubled(jobs[1]))
        for job, one, expected in zip(jobs, (first, second), ([2.0, 4.0], [6.0, 8.0]), strict=True):
            job.finish()
            assert values_of(one) == expected
        assert lane.backend.log == ["send", "send", "compute", "fetch", "compute", "fetch"]
        assert lane.backend.allocated == 0 and not lane.jobs


def test_a_buffer_that_is_used_again_too_early_is_noticed(fakes):
    with pytest.raises(AssertionError, match="used again"), lanes_of(fakes, 1000) as lanes:
        lane = lanes.of["fake:0"]
        one = piece(lane, [1.0, 2.0])
        job = lane.stage([one])
        torch.frombuffer(one.input_views[0], dtype=torch.float32).zero_()
        job.run(lambda: doubled(job))


@pytest.mark.parametrize(("room", "workspace", "held"), [(1000, 0, IN_FLIGHT), (48, 16, 2), (16, 0, 1), (40, 16, 1)])
def test_staging_waits_for_room(fakes, room, workspace, held):
    """Pieces take 16 bytes and a workspace that only the one which is computed needs."""
    with lanes_of(fakes, room) as lanes:
        lane = lanes.of["fake:0"]
        jobs = [lane.stage([piece(lane, [1.0, 2.0], workspace)]) for _ in range(held)]
        staged = []
        waiting = threading.Thread(target=lambda: staged.append(lane.stage([last])))
        last = piece(lane, [5.0, 6.0], workspace)
        assert not lane.has_room(SimpleNamespace(resident=16, workspace=workspace))
        waiting.start()
        jobs[0].run(lambda: doubled(jobs[0]))
        assert not staged
        jobs[0].finish()
        waiting.join()
        for job in [*jobs[1:], *staged]:
            job.run(lambda job=job: doubled(job))
            job.finish()
        assert values_of(last) == [10.0, 12.0]
        assert lane.backend.peak <= room


def test_who_waits_for_room_is_told_when_the_merge_stops(fakes):
    with lanes_of(fakes, 16) as lanes:
        lane = lanes.of["fake:0"]
        lane.stage([piece(lane, [1.0, 2.0])])
        lane.arena.close()
        with pytest.raises(Closed):
            lane.stage([SimpleNamespace(count=2, item=SimpleNamespace(workspace=0, resident_bytes=lambda n: 8 * n))])


def test_what_a_cuda_device_is_told_in_order(monkeypatch):
    """No device is here: streams, events and the runtime only write down what they are asked."""
    from pymerge.engine.cuda import CudaBackend

    told = []

    class Stream:
        def __init__(self, device):
            self.name = f"stream {sum('made' in one for one in told)}"
            told.append((self.name, "made"))

        def wait_event(self, event):
            told.append((self.name, "waits for", event.name))

        def synchronize(self):
            told.append((self.name, "synchronized"))

    class Event:
        def __init__(self, blocking):
            assert blocking
            self.name = f"event {sum('records' in one for one in told)}"

        def record(self, stream):
            told.append((stream.name, "records", self.name))

    @contextmanager
    def inside(stream):
        told.append((stream.name, "in"))
        yield
        told.append((stream.name, "out"))

    runtime = SimpleNamespace(cudaHostRegister=lambda *given: told.append(given) or 0, cudaHostUnregister=lambda at: 1)
    runtime.cudaGetErrorString, runtime.cudaError = "error {}".format, int
    for name, value in {"Stream": Stream, "Event": Event, "stream": inside, "cudart": lambda: runtime}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    backend = CudaBackend(0)
    backend.device = torch.device("cpu")
    source, place = torch.arange(3.0), torch.zeros(3)
    (sent,), arrived = backend.send([source])
    with backend.computing(arrived):
        backend.fetch([(sent + 1, place)])
    assert torch.equal(place, source + 1)
    copies, computes = "stream 0", "stream 1"
    assert told[2:] == [
        (copies, "in"),
        (copies, "records", "event 0"),
        (copies, "out"),
        (computes, "in"),
        (computes, "waits for", "event 0"),
        (computes, "records", "event 1"),
        (copies, "in"),
        (copies, "waits for", "event 1"),
        (copies, "records", "event 2"),
        (copies, "out"),
        (computes, "out"),
    ]
    backend.synchronize()
    backend.pin(4096, 8192)
    assert told[-3:] == [(copies, "synchronized"), (computes, "synchronized"), (4096, 8192, 1)]
    with pytest.raises(RuntimeError, match="cudaHostUnregister: error 1"):
        backend.unpin(4096)
