"""A Ray cluster as a place to run many small calls: connection, resources, lost workers, cancelling."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from pymerge.engine.ray_worker import Failure
from pymerge.errors import ClusterError, RecipeError

RETRIES = 5  # times that a call is begun again after its process or its node was lost
POLL = 0.5  # seconds
GRACE = 30.0  # seconds in which cancelled calls may end
PATIENCE = 60.0  # seconds without any node that could run a call


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connects this process with a cluster, where it is not yet.

    address   `auto`, or HOST:PORT; None: as Ray chooses, a cluster that runs here, else one of this machine alone
    Raises    RecipeError without Ray, or for an address that it cannot be; ClusterError where nobody answers."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RecipeError("the engine ray needs Ray: pip install 'pymerge[ray]'") from None
    if ray.is_initialized():
        yield
        return
    try:
        if address not in (None, "auto"):
            knock(address)
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as e:
        where = "on this machine" if address in (None, "auto") else f"at {address}"
        raise ClusterError(
            f"no Ray cluster answers {where} ({' '.join(str(e).split())[:200]}): start one with `ray start --head`"
        ) from e
    try:
        yield
    finally:
        ray.shutdown()


def knock(address: str) -> None:
    """Raises OSError where nothing listens: Ray would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or "/" in host:
        raise RecipeError(f"{address}: must be auto or HOST:PORT, of a cluster that this machine belongs to")
    socket.create_connection((host, int(port)), timeout=10).close()


def processors() -> int:
    """Of the smallest node that has any."""
    found = [int(have["CPU"]) for have in nodes() if have.get("CPU", 0) >= 1]
    if not found:
        raise ClusterError("no node of the Ray cluster has processors")
    return min(found)


def nodes() -> list[Mapping[str, float]]:
    """The resources of each node that is alive."""
    import ray  # pyright: ignore[reportMissingImports]

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


class Cluster:
    """Runs calls that each take `need` (CPU, memory in bytes, perhaps GPU) of a node."""

    def __init__(self, need: Mapping[str, float]) -> None:
        self.need = need

    @property
    def places(self) -> int:
        """Calls that run side by side now."""
        return sum(int(min(have.get(key, 0) / value for key, value in self.need.items())) for have in nodes())

    def check(self) -> None:
        """Raises RecipeError where no node can run a call."""
        if not self.places:
            said = "; ".join(words(have) for have in nodes()) or "none"
            raise RecipeError(
                f"no node of the Ray cluster has {words(self.need)} for a worker (nodes: {said}): lower --threads or "
                "--memory, which are those of one worker"
            )

    def put(self, value: Any) -> Any:
        """The value as an argument of many calls, sent to a node once."""
        import ray  # pyright: ignore[reportMissingImports]

        return ray.put(value)

    def run(
        self,
        function: Callable[..., Any],
        calls: Sequence[Sequence[Any]],
        take: Callable[[int, Any], None],
        check: Callable[[], None],
    ) -> None:
        """Runs function(*call) of every call; `take` gets its number and what it returned, as they end.

        check    is called again and again; what it raises ends all
        Raises   what `take` and `check` raise, and the error of a call that failed; calls that are left are cancelled
                 then, and what they still return is taken. ClusterError where processes are lost too often."""
        import ray  # pyright: ignore[reportMissingImports]

        task = ray.remote(function).options(
            num_cpus=self.need["CPU"],
            num_gpus=self.need.get("GPU", 0),
            memory=self.need["memory"],
            max_retries=RETRIES,
            scheduling_strategy="SPREAD",
        )
        numbers = {task.remote(*call): n for n, call in enumerate(calls)}
        waiting = list(numbers)
        since = time.monotonic()
        try:
            while waiting:
                ready, waiting = ray.wait(waiting, timeout=POLL)
                for reference in ready:
                    take(numbers[reference], result_of(reference))
                check()
                if ready or self.places:
                    since = time.monotonic()
                elif time.monotonic() - since > PATIENCE:
                    raise ClusterError(
                        f"no node of the Ray cluster has {words(self.need)} any more; what is finished is kept: the "
                        "same command continues it"
                    )
        except BaseException:
            self.cancel(waiting, numbers, take)
            raise

    def cancel(self, waiting: list[Any], numbers: Mapping[Any, int], take: Callable[[int, Any], None]) -> None:
        import ray  # pyright: ignore[reportMissingImports]

        for reference in waiting:
            ray.cancel(reference)
        until = time.monotonic() + GRACE
        while waiting and time.monotonic() < until:
            ready, waiting = ray.wait(waiting, timeout=POLL)
            for reference in ready:
                with suppress(Exception):  # cancelled, most of them
                    take(numbers[reference], result_of(reference))


def words(resources: Mapping[str, float]) -> str:
    found = [f"{resources.get('CPU', 0):g} CPUs", f"{resources.get('memory', 0) / 1e9:.1f} GB"]
    return ", ".join(found + ([f"{resources['GPU']:g} GPUs"] if resources.get("GPU") else []))


def result_of(reference: Any) -> Any:
    """What a call returned; raises what it failed with."""
    import ray  # pyright: ignore[reportMissingImports]

    try:
        found = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise_cause(error)
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"{' '.join(str(error).split())[:400]}; begun {RETRIES + 1} times. What is finished is kept: the same "
            "command continues it"
        ) from None
    return unpacked(found)


def unpacked(found: Any) -> Any:
    """What a worker found; raises the error that it sent in its place."""
    if isinstance(found, Failure):
        raise found.error from found.cause
    return found


def raise_cause(error: Any) -> NoReturn:
    if isinstance(error.cause, ImportError):
        raise ClusterError(
            f"a worker cannot run pymerge ({error.cause}): all machines need it, in the same version"
        ) from None
    raise error.cause from error
