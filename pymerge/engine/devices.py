"""Where a merge computes: which devices are named, what each has for it, which item goes to which.

What is bound by memory is no work for a device. An element-wise rule on T bfloat16 models reads 2 (T + 1) bytes an
entry and computes 3 T + 2 operations. Its bytes come from files into this computer's memory either way; from there they
cross PCIe at 25 to 50 GB/s to reach a device, while the host's kernel merges 10 to 20 GB/s on every core where they
are. So the CPU, where it is named, takes all element-wise work, and devices the steps for matrices, whose operations a
byte number thousands. A device that is named alone gets everything that is merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol
from zlib import crc32

from pymerge.checkpoint import safe_name
from pymerge.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.engine.plan import Item

HOST: Final = "cpu"
IN_FLIGHT: Final = 3  # pieces of work on a device at once: one arrives, one is computed, one leaves
FREE_SHARE: Final = 0.8  # of a device's free memory, where no budget is given
DEVICE_SLACK: Final = 256 << 20  # of a device's budget: workspaces of its libraries, rounding of allocations
# Only the balance between devices depends on these.
LINK_RATE: Final = 25e9  # bytes a second to or from a device
DEVICE_FLOP_RATE: Final = 1e12  # of the steps for matrices, mostly decompositions


class Event(Protocol):
    def synchronize(self) -> None:
        """Waits until what was started before it is done."""
        ...


class Backend(Protocol):
    """A device with two streams: one copies, one computes. Constructed with the device's number."""

    @classmethod
    def count(cls) -> int:
        """How many there are here."""
        ...

    def free_bytes(self) -> int: ...

    def limited(self, nbytes: int) -> AbstractContextManager[None]:
        """More than this on top of what is allocated already cannot be allocated inside."""
        ...

    def peak_bytes(self) -> int:
        """The most that was allocated since `limited` was entered, beyond what was there before."""
        ...

    def pin(self, address: int, nbytes: int) -> None:
        """Lets copies from and to this memory go on beside the program."""
        ...

    def unpin(self, address: int) -> None: ...

    def send(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        """Starts to copy tensors to the device. They and the copies must be kept until an event behind both is over."""
        ...

    def computing(self, behind: Event) -> AbstractContextManager[None]:
        """What is started inside is computed behind the event."""
        ...

    def fetch(self, results: Sequence[tuple[Tensor, Tensor]]) -> Event:
        """Starts to copy each first tensor into the second, behind all that is being computed."""
        ...

    def synchronize(self) -> None:
        """Waits until nothing goes on."""
        ...


def cuda(index: int | None = None) -> Any:
    """The class of CUDA devices, or one of them."""
    from pymerge.engine.cuda import CudaBackend

    return CudaBackend if index is None else CudaBackend(index)


BACKENDS: Final[dict[str, Callable[..., Any]]] = {"cuda": cuda}


def backend_of(name: str) -> Backend:
    kind, _, index = name.partition(":")
    return BACKENDS[kind](int(index))


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a device has for the merge, and its part of the plan.

    budget     bytes for the merge
    peak       bytes of these that are taken at most
    items      how many are merged there
    nbytes     their inputs and outputs
    flops      estimate of their operations"""

    name: str
    budget: int
    peak: int = 0
    items: int = 0
    nbytes: int = 0
    flops: int = 0

    @property
    def memory(self) -> int:
        """What there is for tensors."""
        return self.budget - DEVICE_SLACK

    @property
    def seconds(self) -> float:
        """What its work takes, about."""
        return self.nbytes / LINK_RATE + self.flops / DEVICE_FLOP_RATE

    def plain(self) -> dict[str, Any]:
        """For people and machines."""
        return {
            "name": self.name,
            "items": self.items,
            "bytes": self.nbytes,
            "flops": self.flops,
            "budget_bytes": self.budget,
            "peak_bytes": self.peak,
        }


def names_of(text: str) -> tuple[tuple[str, ...], bool]:
    """The devices of `cuda:0,cuda:1`, `cuda,cpu`, `auto`, and whether the CPU is among them.

    Raises RecipeError: an unknown name, one that is not here, the same twice."""
    if text.strip() == "auto":
        return tuple(f"{kind}:{i}" for kind in BACKENDS for i in range(BACKENDS[kind]().count())), True
    names = [name_of(part.strip()) for part in text.split(",")]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"device {text!r}: {name} is named twice")
    return tuple(name for name in names if name != HOST), HOST in names


def name_of(part: str) -> str:
    """One device, with its number."""
    kind, colon, index = part.partition(":")
    if part == HOST:
        return HOST
    if kind not in BACKENDS or (colon and not index.isdecimal()):
        known = ", ".join(f"{kind}, {kind}:1" for kind in BACKENDS)
        raise RecipeError(f"device {part!r} cannot be used here: expected cpu, {known}, several with commas, or auto")
    count = BACKENDS[kind]().count()
    number = int(index or 0)
    if number >= count:
        here = ", ".join(f"{kind}:{i}" for i in range(count))
        raise RecipeError(
            f"device {part!r} cannot be used here: "
            + (f"there is {here}" if count else f"torch finds no {kind.upper()} device (pymerge info)")
        )
    return f"{kind}:{number}"


def devices_of(text: str, memory: int | None) -> tuple[tuple[Device, ...], bool]:
    """As `names_of`, with the memory that each has: `memory` bytes of it, or a share of what is free now.

    Raises RecipeError also where there is less."""
    names, host = names_of(text)
    devices = []
    for name in names:
        free = backend_of(name).free_bytes()
        budget = int(free * FREE_SHARE) if memory is None else memory
        if budget > free or budget <= DEVICE_SLACK:
            raise RecipeError(
                f"{name} has {free / 1e6:.0f} MB free, {budget / 1e6:.0f} MB would be for the merge: give it between "
                f"{DEVICE_SLACK / 1e6:.0f} MB and what is free (--device-memory, device_memory= in Python), or name "
                "another device"
            )
        devices.append(Device(name=name, budget=budget))
    return tuple(devices), host


def start(text: str) -> None:
    """Loads the libraries of the devices named, which are memory of the program before they are of a merge."""
    for name in names_of(text)[0]:
        backend_of(name).free_bytes()


def refuse_device(devices: Sequence[Device], needed: int, what: str) -> NoReturn:
    largest = max(devices, key=lambda device: device.budget)
    named = ",".join(device.name for device in devices)
    raise RecipeError(
        f"{what} needs {(needed + DEVICE_SLACK) / 1e6:.1f} MB of a device, {largest.name} has "
        f"{largest.budget / 1e6:.1f} MB for the merge: give more with --device-memory (device_memory= in Python), or "
        f"name the CPU too, which then takes what does not fit: --device {named},cpu"
    )


def placed(items: Sequence[Item], devices: Sequence[Device]) -> tuple[list[Item], tuple[Device, ...]]:
    """The items with the device that each goes to, and the devices with what comes to them. Largest cost first, each
    to the device with the least work among those that hold it: the same for the same plan, always."""
    work = together([item for item in items if item.device != HOST])
    load, goes = {device.name: 0.0 for device in devices}, {}
    got: dict[str, list[list[Item]]] = {device.name: [] for device in devices}
    for members in sorted(work, key=cost, reverse=True):
        held = [device.name for device in devices if resident(members) + workspace(members) <= device.memory]
        name = min(held, key=lambda name: load[name])
        load[name] += cost(members)
        got[name].append(members)
        goes |= {id(item): name for item in members}
    found = [replace(item, device=goes.get(id(item), HOST)) for item in items]
    return found, tuple(share(device, got[device.name]) for device in devices)


def together(items: Sequence[Item]) -> list[list[Item]]:
    """Matrices that are merged as one, and all other items alone, in the plan's order."""
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(id(item) if item.entry.join is None else ("join", item.entry.join[0]), []).append(item)
    return list(groups.values())


def cost(members: Sequence[Item]) -> float:
    """Seconds on a device, about: what is copied, what is computed."""
    moved = sum(item.read_bytes + item.count * item.out_width for item in members)
    return moved / LINK_RATE + sum(item.flops for item in members) / DEVICE_FLOP_RATE


def resident(members: Sequence[Item]) -> int:
    """Bytes of inputs and outputs of a tile."""
    return sum(item.resident_bytes(min(item.tile, item.count)) for item in members)


def workspace(members: Sequence[Item]) -> int:
    return sum(item.workspace for item in members)


def share(device: Device, work: Sequence[Sequence[Item]]) -> Device:
    """The device with what comes to it. At most IN_FLIGHT pieces are there at once, one of them being computed."""
    largest = sorted(
        (resident(m) for m in work for _ in range(min(IN_FLIGHT, math.ceil(m[0].count / m[0].tile)))), reverse=True
    )
    peak = sum(largest[:IN_FLIGHT]) + max((workspace(m) for m in work), default=0)
    items = [item for members in work for item in members]
    return replace(
        device,
        peak=min(device.memory, peak) + DEVICE_SLACK if work else 0,
        items=len(items),
        nbytes=sum(item.read_bytes + item.count * item.out_width for item in items),
        flops=sum(item.flops for item in items),
    )


def remarks(items: Sequence[Item], devices: Sequence[Device]) -> list[str]:
    """What a device is not given."""
    kept = [item for item in items if item.mode == "generic" and item.device == HOST and not item.factored]
    if not devices or not kept:
        return []
    return [
        f"{len(kept)} matrices are merged on the CPU, {safe_name(kept[0].entry.name)} the first: a device's memory "
        "does not hold them, or the whole model is asked about what is behind their steps"
    ]


def placement(items: Sequence[Item]) -> str:
    """A digest of which item goes to which device, and is merged by its factors there."""
    lines = [f"{item.entry.name} {item.first} {item.device} {item.factored}" for item in items]
    return f"{crc32(chr(10).join(lines).encode('utf-8', 'surrogatepass')):08x}"
