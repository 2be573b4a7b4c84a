"""The CUDA operators where pymerge was built without nvcc: NVRTC, through CuPy, compiles a kernel at its first launch.

`_ops_nvrtc.so` holds the launchers of csrc/cuda as g++ compiles them: checks, memory, grids, arguments. What they need
of a device is the table of functions here. Kernels are compiled from the headers beside this package, as nvcc would:
CuPy's own RawModule is not used, since it always adds -ftz=true, which changes subnormal numbers.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent.parent
LIBRARY = HERE / "_ops_nvrtc.so"
SHIPPED, IN_TREE = HERE / "_csrc", HERE.parent / "csrc"
OPTIONS = ("-std=c++20", "--fmad=false", "--device-as-default-execution-space")
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
DEVICE_TO_HOST = 2  # cudaMemcpyDeviceToHost

_P, _INT, _TEXT = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
_failure = threading.local()


class Shape(ctypes.Structure):
    """Of a launch, as in csrc/nvrtc/launch.h."""

    _fields_ = [("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("shared", ctypes.c_uint32)]


_CALLS: dict[str, Any] = {  # what the launchers need of a device
    "launch": ctypes.CFUNCTYPE(_INT, _TEXT, _TEXT, ctypes.POINTER(Shape), _P, _P),
    "attribute": ctypes.CFUNCTYPE(_INT, _INT, _INT, ctypes.POINTER(_INT)),
    "stream": ctypes.CFUNCTYPE(_INT, _INT, ctypes.POINTER(_P)),
    "fill": ctypes.CFUNCTYPE(_INT, _P, _INT, ctypes.c_uint64, _P),
    "read": ctypes.CFUNCTYPE(_INT, _P, _P, ctypes.c_uint64, _P),
}
_MESSAGE: Any = ctypes.CFUNCTYPE(_P)


class Table(ctypes.Structure):
    """`Device` of csrc/nvrtc/launch.h."""

    _fields_ = [*_CALLS.items(), ("message", _MESSAGE)]


class Kernel(NamedTuple):
    header: str  # csrc/cuda/HEADER.cuh
    name: str  # as C++ writes it
    sizes: tuple[int, ...]  # of its arguments, in bytes


def kernels(path: Path = LIBRARY) -> list[Kernel]:
    """All that the launchers of a library can launch."""
    import torch  # noqa: F401  its libraries are loaded with it

    found: list[Kernel] = []

    @ctypes.CFUNCTYPE(None, _TEXT, _TEXT, ctypes.POINTER(ctypes.c_int64), _INT)
    def each(file: bytes, name: bytes, sizes: Any, count: int) -> None:
        found.append(Kernel(Path(file.decode()).stem, name.decode(), tuple(sizes[:count])))

    ctypes.CDLL(str(path)).pymerge_nvrtc_kernels(each)
    return list(dict.fromkeys(found))


def headers() -> Path:
    """Where cuda/*.cuh and common/*.h are: in an installed package, or in the source tree."""
    return SHIPPED if SHIPPED.is_dir() else IN_TREE


def _cuda() -> Any:
    return importlib.import_module("cupy.cuda")


@contextlib.contextmanager
def _torchs_device() -> Iterator[Any]:
    """The device that torch has chosen, which CuPy need not know of."""
    import torch

    device = _cuda().Device(torch.cuda.current_device())
    with device:
        yield device


@functools.cache
def _headers_digest() -> bytes:
    digest = hashlib.sha256()
    for path in sorted((*headers().glob("common/*.h"), *headers().glob("cuda/*.cuh"))):
        digest.update(path.read_bytes())
    return digest.digest()


def compile_kernel(header: str, name: str, architecture: str) -> tuple[str, bytes]:
    """The name in the module, and the module (cubin), for compute capability `architecture` ("90")."""
    nvrtc = _cuda().nvrtc
    source = f'#include "cuda/{header}.cuh"\nusing namespace pymerge::cuda;\n'
    program = nvrtc.createProgram(source, f"{header}.cu", (), ())
    try:
        nvrtc.addNameExpression(program, name)
        nvrtc.compileProgram(program, (*OPTIONS, f"-I{headers()}", f"-arch=sm_{architecture}"))
        return nvrtc.getLoweredName(program, name), nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        what = f"NVRTC does not compile {name} of {header}.cuh for sm_{architecture}"
        raise RuntimeError(f"{what}: {error}\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


def compiled(header: str, name: str, architecture: str) -> tuple[str, bytes]:
    """`compile_kernel`, kept among CuPy's compiled kernels (CUPY_CACHE_DIR)."""
    nvrtc = _cuda().nvrtc
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    what = repr((header, name, architecture, OPTIONS, nvrtc.getVersion())).encode()
    place = folder / f"pymerge_{hashlib.sha256(_headers_digest() + what).hexdigest()}.cubin"
    if place.is_file():
        lowered, _, module = place.read_bytes().partition(b"\n")
        return lowered.decode(), module
    lowered, module = compile_kernel(header, name, architecture)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(lowered.encode() + b"\n" + module)
        os.replace(file.name, place)
    except OSError:
        pass  # a folder that cannot be written costs a compilation in each process
    return lowered, module


class _Loaded(NamedTuple):
    function: Any  # cupy.cuda.Function, whose module it keeps
    allowed: list[int]  # bytes of dynamic shared memory


class CupyDevice:
    """What the launchers need, answered by CuPy: launches on the stream that torch is using, on torch's device."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[int, bytes, bytes], _Loaded] = {}
        self._lock = threading.Lock()

    def _load(self, device: Any, file: bytes, name: bytes) -> _Loaded:
        with self._lock:
            found = self._loaded.get((device.id, file, name))
            if found is None:
                lowered, image = compiled(Path(file.decode()).stem, name.decode(), device.compute_capability)
                module = _cuda().Module()
                module.load(image)
                found = self._loaded[device.id, file, name] = _Loaded(module.get_function(lowered), [0])
        return found

    def launch(self, file: bytes, name: bytes, shape: Any, stream: int | None, arguments: int) -> None:
        cuda, how = _cuda(), shape.contents
        with _torchs_device() as device:
            function, allowed = self._load(device, file, name)
            if how.shared > allowed[0]:
                cuda.driver.funcSetAttribute(function.ptr, MAX_DYNAMIC_SHARED, how.shared)
                allowed[0] = how.shared
            cuda.driver.launchKernel(function.ptr, *how.grid, *how.block, how.shared, stream or 0, arguments, 0)

    def attribute(self, device: int, which: int, value: Any) -> None:
        value[0] = _cuda().runtime.deviceGetAttribute(which, device)

    def stream(self, device: int, stream: Any) -> None:
        import torch

        stream[0] = torch.cuda.current_stream(device).cuda_stream

    def fill(self, to: int, value: int, count: int, stream: int | None) -> None:
        with _torchs_device():
            _cuda().runtime.memsetAsync(to, value, count, stream or 0)

    def read(self, to: int, source: int, count: int, stream: int | None) -> None:
        runtime = _cuda().runtime
        with _torchs_device():
            runtime.memcpyAsync(to, source, count, DEVICE_TO_HOST, stream or 0)
            runtime.streamSynchronize(stream or 0)


def _checked(call: Callable[..., None]) -> Callable[..., int]:
    """0, or 1 with the message of what went wrong kept for the launcher, which raises it."""

    def run(*args: Any) -> int:
        try:
            call(*args)
        except Exception as error:
            _failure.text = ctypes.create_string_buffer(f"pymerge: {type(error).__name__}: {error}".encode())
            return 1
        return 0

    return run


def table(device: Any) -> Table:
    """`device` (a CupyDevice, in tests something alike) as the launchers call it."""
    functions = [kind(_checked(getattr(device, name))) for name, kind in _CALLS.items()]
    return Table(*functions, _MESSAGE(lambda: ctypes.addressof(_failure.text)))


def load(path: Path, device: Any) -> ctypes.CDLL:
    """Registers the launchers of a library for torch; what they launch goes to `device` from then on."""
    import torch

    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.connected = table(device)  # type: ignore[attr-defined]
    library.pymerge_nvrtc_connect(ctypes.byref(library.connected))  # type: ignore[attr-defined]
    return library


def connect() -> bool:
    """The operators on CUDA by NVRTC, if this build has their launchers and CuPy is installed; compiles nothing yet."""
    if not LIBRARY.is_file() or importlib.util.find_spec("cupy") is None:
        return False
    load(LIBRARY, CupyDevice())
    return True
