"""The CUDA kernels on the CPU (csrc/emu), reached through ctypes, and pymerge._C on the same arrays."""

from __future__ import annotations

import atexit
import ctypes
import functools
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pymerge import _C

SOURCE = Path(__file__).parent / "emulated_kernels.cpp"
CODES = {"BF16": 0, "F16": 1, "F32": 2, "F64": 3}
ITEM = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
NORMS = {"none": 0, "weights": 1, "count": 2, "max": 3}


class TaskFields(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("key", ctypes.c_uint64),
        ("rank", ctypes.c_int64),
        ("keep", ctypes.c_double),
        ("dtype", ctypes.c_int32),
        ("prefix", ctypes.c_uint32),
        ("weight", ctypes.c_float),
        ("rescale", ctypes.c_float),
    ]


class ProblemFields(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_void_p),
        ("tasks", ctypes.POINTER(TaskFields)),
        ("count", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("row_length", ctypes.c_int64),
        ("top_theta", ctypes.c_void_p),
        ("top_index", ctypes.c_void_p),
        ("skip_theta", ctypes.c_void_p),
        ("skip_index", ctypes.c_void_p),
        ("base_dtype", ctypes.c_int32),
        ("task_count", ctypes.c_int32),
        ("masked", ctypes.c_int32),
        ("rescaled", ctypes.c_int32),
    ]


class MergeFields(ctypes.Structure):
    _fields_ = [
        ("add", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("bad", ctypes.c_void_p),
        ("add_dtype", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        ("add_is_base", ctypes.c_int32),
        ("elect", ctypes.c_int32),
        ("norm", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("divisor", ctypes.c_float),
        ("tie_sign", ctypes.c_float),
    ]


EMULATOR = SOURCE.parents[2] / "csrc" / "emu"
COMPILE = ["g++", "-std=c++20", "-fPIC", "-fno-gnu-unique", "-ffp-contract=off", "-Wno-psabi"]
LINK = ["g++", "-shared", "-Wl,-Bsymbolic"]
REDZONE = 64  # bytes behind each __shared__ array that belong to none
ORDERS = {"forward": 0, "reversed": 1, "shuffled": 2}


class EmulationError(Exception):
    """What the emulator found wrong with a kernel."""


@functools.cache
def emulator() -> ctypes.CDLL:
    """The emulator, which all libraries of kernels share."""
    folder = Path(tempfile.mkdtemp(prefix="pymerge-emulator-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = folder / "emulator.so"
    subprocess.run([*COMPILE, "-O2", *LINK[1:], *EMULATOR.glob("*.cpp"), "-o", library], check=True)
    native = ctypes.CDLL(str(library))
    native.emu_take_failure.restype = ctypes.c_char_p
    native.emu_allocate.restype = ctypes.c_void_p
    return native


class Library:
    """A library of kernels; a call raises EmulationError with what the emulator found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.native = ctypes.CDLL(str(path))
        here = ctypes.cast(self.native.emu_kernels, ctypes.c_void_p)
        for offset, size, name in shared_arrays(path):
            emulator().emu_add_shared_array(here, ctypes.c_size_t(offset), ctypes.c_size_t(size), name.encode())

    def set_order(self, order: str, seed: int = 0) -> None:
        emulator().emu_set_order(ORDERS[order], ctypes.c_uint64(seed))

    def __getattr__(self, name: str) -> Callable[..., int]:
        function = getattr(self.native, name)

        def call(*args: object) -> int:
            result = function(*args)
            failure = emulator().emu_take_failure()
            if failure is not None:
                raise EmulationError(self.with_line(failure.decode()))
            return result

        return call

    def with_line(self, message: str) -> str:
        """The message with a line of source for the place in the library's code that it names."""
        message, found, code = message.partition(", code ")
        if not found:
            return message
        command = ["addr2line", "-e", self.path, hex(int(code, 16) - 1)]  # it is where the check returns to
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("/")[-1]
        return f"{message}, {line.split()[0]}"


def with_redzones(assembly: str) -> str:
    """Each thread-local array (csrc/emu makes __shared__ arrays such) followed by space that no symbol covers."""
    section, lines = "", []
    for line in assembly.splitlines():
        word = line.split(maxsplit=1)[:1]
        if word in ([".section"], [".text"], [".data"], [".bss"]):
            section = line
        lines.append(line)
        if ".tbss" in section and word == [".zero"]:
            lines.append(f"\t.zero\t{REDZONE}")
    return "\n".join(lines) + "\n"


def shared_arrays(library: Path) -> list[tuple[int, int, str]]:
    """(offset, bytes, name) of the thread-local variables of functions."""
    table = subprocess.run(["readelf", "-sW", "-C", library], check=True, capture_output=True, text=True).stdout
    found = set()
    for line in table.splitlines():
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[3] == "TLS" and "::" in fields[7] and "pymerge::emu::" not in fields[7]:
            found.add((int(fields[1], 16), int(fields[2]), fields[7].rsplit("::", 1)[1]))
    return sorted(found)


def build(folder: Path, source: Path = SOURCE) -> Library:
    """The kernels that `source` includes, with every access of theirs reported to the emulator."""
    library, assembly = folder / f"{source.stem}.so", folder / f"{source.stem}.s"
    checked = ["-O1", "-g1", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]
    checked += ["-fno-tree-sra"]  # vectors are loaded whole, so that their alignment is seen
    compiling = subprocess.Popen([*COMPILE, *checked, "-S", source, "-o", assembly])
    shared = emulator()._name  # built meanwhile, if it is not there
    if compiling.wait() != 0:
        raise subprocess.CalledProcessError(compiling.returncode, compiling.args)
    assembly.write_text(with_redzones(assembly.read_text()))
    subprocess.run([*LINK, assembly, shared, "-o", library], check=True)
    return Library(library)


def buffer(count: int, dtype: np.dtype | type, misplaced: int = 0) -> np.ndarray:
    """Device memory, `misplaced` bytes behind a multiple of 16: a kernel that leaves it fails. Filled with rubbish."""
    size = count * np.dtype(dtype).itemsize
    place = emulator().emu_allocate(ctypes.c_size_t(size), ctypes.c_size_t(misplaced))
    memory = (ctypes.c_char * max(size, 1)).from_address(place)
    weakref.finalize(memory, emulator().emu_deallocate, ctypes.c_void_p(place))
    return np.frombuffer(memory, dtype=dtype, count=count)


def filled(count: int, dtype: np.dtype | type, value: float = 0) -> np.ndarray:
    array = buffer(count, dtype)
    array[:] = value
    return array


@dataclass(frozen=True)
class Stored:
    """Entries as a checkpoint holds them; `array` may begin anywhere in memory."""

    array: np.ndarray
    code: str

    @property
    def address(self) -> int:
        return self.array.ctypes.data

    @property
    def host(self) -> tuple[int, str]:
        return self.address, self.code


def store(x: np.ndarray, code: str, offset: int = 0) -> Stored:
    """x in a dtype, in device memory, `offset` entries behind a multiple of 16 bytes."""
    item = np.dtype(ITEM[code])
    array = buffer(x.size, item, offset * item.itemsize % 16)
    array[:] = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) if code == "BF16" else x.astype(item)
    return Stored(array, code)


def empty(count: int, code: str, offset: int = 0) -> Stored:
    return store(np.zeros(count, dtype=np.float32), code, offset)


Cut = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One call on T tensors, for both sides."""

    base: Stored | None
    tuned: tuple[Stored, ...]
    weights: tuple[float, ...] | None = None
    scale: float = 1.0
    divisor: float = 1.0
    rescales: tuple[float, ...] | None = None
    keep: tuple[float, ...] | None = None
    keys: tuple[int, ...] | None = None
    row_length: int = 0
    top: Cut | None = None
    skip: Cut | None = None
    elect: bool = False
    tie_sign: int = 1
    norm: str = "none"
    ranks: tuple[int, ...] | None = None
    prefix: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        return self.tuned[0].array.size

    @property
    def rows(self) -> int:
        return self.count // self.row_length if self.row_length else 1

    def with_cut(self, name: str, ranks: tuple[int, ...]) -> Problem:
        theta, index = host_kth(replace(self, ranks=ranks))
        return replace(self, **{name: (theta, index)})

    @property
    def host_base(self) -> tuple[int, str] | None:
        return None if self.base is None else self.base.host

    @property
    def host_tuned(self) -> list[tuple[int, str]]:
        return [x.host for x in self.tuned]

    def params(self) -> _C.DeltaParams:
        def parts(cut: Cut | None) -> tuple[bytes, bytes] | tuple[None, None]:
            return (None, None) if cut is None else (cut[0].tobytes(), cut[1].tobytes())

        top, skip = parts(self.top), parts(self.skip)
        return _C.DeltaParams(
            list(self.weights or (1.0,) * len(self.tuned)), self.scale, self.divisor, self.rescales, self.keep,
            self.keys, self.row_length, *top, *skip, self.elect, self.tie_sign, self.norm,
        )  # fmt: skip

    def fields(self) -> ProblemFields:
        tasks = (TaskFields * len(self.tuned))()
        for t, x in enumerate(self.tuned):
            tasks[t] = TaskFields(
                data=x.address,
                dtype=CODES[x.code],
                key=self.keys[t] if self.keys else 0,
                keep=self.keep[t] if self.keep else 1.0,
                rank=self.ranks[t] if self.ranks else 0,
                prefix=self.prefix[t] if self.prefix else 0,
                weight=self.weights[t] if self.weights else 1.0,
                rescale=self.rescales[t] if self.rescales else 1.0,
            )
        result = ProblemFields(
            tasks=tasks,
            count=self.count,
            rows=self.rows,
            row_length=self.row_length,
            task_count=len(self.tuned),
            masked=self.keep is not None,
            rescaled=self.rescales is not None,
        )
        if self.base is not None:
            result.base, result.base_dtype = self.base.address, CODES[self.base.code]
        for name, cut in (("top", self.top), ("skip", self.skip)):
            if cut is not None:
                setattr(result, f"{name}_theta", cut[0].ctypes.data)
                setattr(result, f"{name}_index", cut[1].ctypes.data)
        return result


def host_kth(problem: Problem) -> Cut:
    assert problem.ranks is not None
    theta, index = _C.delta_kth(
        problem.host_base, problem.host_tuned, problem.count, list(problem.ranks), problem.row_length, problem.keep,
        problem.keys,
    )  # fmt: skip
    return np.frombuffer(theta, dtype=np.float32), np.frombuffer(index, dtype=np.int64)


def emulated_kth(library: Library, problem: Problem, *, long_row: bool) -> Cut:
    theta = filled(len(problem.tuned) * problem.rows, np.float32, -1)
    index = filled(theta.size, np.int64, -1)
    fields = problem.fields()
    library.emulate_kth(
        ctypes.byref(fields), int(long_row), ctypes.c_void_p(theta.ctypes.data), ctypes.c_void_p(index.ctypes.data)
    )
    return theta, index


def emulated_merge(library: Library, problem: Problem, add: Stored | None, out: Stored) -> list[int]:
    bad = filled(len(problem.tuned) + 3, np.int64)
    fields, merge = problem.fields(), MergeFields(out=out.address, bad=bad.ctypes.data, out_dtype=CODES[out.code])
    if add is not None:
        merge.add, merge.add_dtype = add.address, CODES[add.code]
        merge.add_is_base = int(problem.base is not None and add.address == problem.base.address)
    merge.elect, merge.norm, merge.tie_sign = int(problem.elect), NORMS[problem.norm], problem.tie_sign
    merge.scale, merge.divisor = problem.scale, problem.divisor
    library.emulate_merge(ctypes.byref(fields), ctypes.byref(merge))
    return bad.tolist()


def host_merge(problem: Problem, add: Stored | None, out: Stored) -> list[int]:
    added = None if add is None else add.host
    return _C.delta_merge(problem.host_base, problem.host_tuned, added, out.host, problem.count, 0, problem.params())
