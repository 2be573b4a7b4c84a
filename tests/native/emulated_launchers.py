"""The launchers of csrc/cuda, as built for NVRTC, with the emulator as the device: whole operators on the CPU."""

from __future__ import annotations

import ctypes
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import torch

import tests.native.emulated as e
from pymerge.ops import _nvrtc

SOURCES = sorted((Path(__file__).parents[2] / "csrc" / "nvrtc").glob("*.cpp"))
TORCH = Path(torch.__file__).parent
FLAGS = ["-O1", "-Wno-unknown-pragmas", "-DPYMERGE_NVRTC", "-DPYMERGE_EMULATED"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL", f"-I{sysconfig.get_paths()['include']}"]
FLAGS += [f"-isystem{TORCH / 'include'}", f"-isystem{TORCH / 'include/torch/csrc/api/include'}"]
MULTIPROCESSORS, SHARED_BYTES = 3, 227 << 10
ATTRIBUTES = {16: MULTIPROCESSORS, 97: SHARED_BYTES}  # numbers of CUDA's cudaDeviceAttr
KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)


class EmulatedDevice:
    """Keeps what was launched; the library runs it."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, str, tuple[int, ...], tuple[int, ...], int]] = []

    def launch(self, file: bytes, name: bytes, shape: Any, stream: int | None, arguments: int) -> None:
        how = shape.contents
        self.launches.append((Path(file.decode()).stem, name.decode(), (*how.grid,), (*how.block,), how.shared))

    def attribute(self, device: int, which: int, value: Any) -> None:
        value[0] = ATTRIBUTES[which]

    def stream(self, device: int, stream: Any) -> None:
        stream[0] = None

    def fill(self, to: int, value: int, count: int, stream: int | None) -> None:
        ctypes.memset(to, value, count)

    def read(self, to: int, source: int, count: int, stream: int | None) -> None:
        ctypes.memmove(to, source, count)


def build(folder: Path) -> Path:
    path = folder / "launchers.so"
    objects = [folder / f"{source.stem}.o" for source in SOURCES]
    running = [subprocess.Popen([*e.COMPILE, *FLAGS, "-c", s, "-o", o]) for s, o in zip(SOURCES, objects, strict=True)]
    emulator = e.emulator()._name
    for one in running:
        if one.wait() != 0:
            raise subprocess.CalledProcessError(one.returncode, one.args)
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([*e.LINK, *objects, emulator, *libraries, "-o", path], check=True)
    return path


class Operators:
    """torch.ops.pymerge on the launchers of a library, for tensors in host memory."""

    def __init__(self, path: Path) -> None:
        self.device = EmulatedDevice()
        self.connected = _nvrtc.load(path, self.device)
        self.shared = e.Library(path)  # its __shared__ arrays are known to the emulator

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = getattr(torch.ops.pymerge, name).default.redispatch(KEY, *args, **kwargs)
            failure = e.emulator().emu_take_failure()
            if failure is not None:
                raise e.EmulationError(failure.decode())
            return result

        return call
