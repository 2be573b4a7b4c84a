"""Kernels by NVRTC: what is launched, with which arguments, and that NVRTC compiles all of it."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from pymerge.ops import OPERATORS, _load, _nvrtc, implementations
from tests.native import emulated_launchers

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to build the launchers")
NEEDS_LIBRARY = pytest.mark.skipif(not _nvrtc.LIBRARY.is_file(), reason="built with CUDA: no launchers for NVRTC")


def device_calls():
    """A copy of the small calls of every operator, whose OPS can be replaced."""
    spec = importlib.util.spec_from_file_location("emulated_calls", ROOT / "benchmarks" / "device_calls.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    for name in OPERATORS:
        importlib.import_module(f"pymerge.ops.{name}")
    return emulated_launchers.Operators(emulated_launchers.build(tmp_path_factory.mktemp("launchers")))


@NEEDS_COMPILER
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_on_emulated_kernels_agree_with_the_cpu(operators, name):
    calls = device_calls()
    wanted = calls.run(name, "cpu")
    operators.device.launches.clear()
    calls.OPS = operators
    found = calls.run(name, "cpu")
    assert operators.device.launches
    for cpu, emulated in zip(wanted, found, strict=True):
        assert cpu.dtype == emulated.dtype and cpu.shape == emulated.shape
        if cpu.is_floating_point():
            torch.testing.assert_close(emulated, cpu, rtol=1e-4, atol=1e-5 * float(cpu.abs().nan_to_num(0, 0, 0).max()))
        else:
            assert torch.equal(cpu, emulated)


@NEEDS_COMPILER
def test_launches(operators):
    """Grid, block and shared memory are those of the launchers: by hand here for one kernel with and one without."""
    base, tuned = torch.zeros(3, 1001), [torch.ones(3, 1001)] * 2
    operators.device.launches.clear()
    operators.delta_l1(base, tuned, None, None, 0, None, None, None, None)
    operators.delta_histogram(base, tuned, None, None, None)
    assert operators.device.launches == [
        ("delta_l1", "pymerge::cuda::l1_kernel", (1, 2, 1), (256, 1, 1), 0),
        ("delta_l1", "pymerge::cuda::add_parts_kernel", (4, 1, 1), (256, 1, 1), 0),
        ("delta_histogram", "pymerge::cuda::histogram_kernel", (1, 2, 1), (512, 1, 1), 2 * 32768 + 16 * 8),
    ]


@NEEDS_COMPILER
def test_failures_of_the_device_are_raised(operators, monkeypatch):
    def refuse(*args):
        raise ValueError("no such stream")

    monkeypatch.setattr(emulated_launchers.EmulatedDevice, "stream", refuse)
    broken = _nvrtc.table(emulated_launchers.EmulatedDevice())
    native = operators.connected
    native.pymerge_nvrtc_connect(ctypes.byref(broken))
    try:
        with pytest.raises(RuntimeError, match="pymerge: ValueError: no such stream"):
            operators.gram64(torch.ones(4, 4))
    finally:
        native.pymerge_nvrtc_connect(ctypes.byref(native.connected))


@NEEDS_LIBRARY
def test_every_kernel_of_the_sources_can_be_launched():
    text = "".join(path.read_text() for path in (CSRC / "cuda").glob("*.cuh"))
    written = set(re.findall(r"__global__ void(?:\s+__launch_bounds__\((?:[^()]|\([^()]*\))*\))?\s+(\w+)\(", text))
    listed = {re.sub(r"<.*", "", kernel.name).rpartition("::")[2] for kernel in _nvrtc.kernels()}
    assert listed == written and len(written) > 20


@NEEDS_LIBRARY
def test_the_library_needs_no_cuda():
    table = subprocess.run(["readelf", "-dW", _nvrtc.LIBRARY], check=True, capture_output=True, text=True).stdout
    assert "libtorch" in table and not re.search("cudart|libcuda|torch_cuda|cupy", table)


def test_headers_are_package_data(tmp_path):
    pytest.importorskip("pybind11", reason="setup.py needs pybind11")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path / "lib"],
        cwd=ROOT, check=True, capture_output=True, env={**os.environ, "PYMERGE_CUDA": "0"},
    )  # fmt: skip
    shipped = tmp_path / "lib" / "pymerge" / "_csrc"
    for folder, pattern in (("cuda", "*.cuh"), ("common", "*.h")):
        names = {path.name for path in (CSRC / folder).glob(pattern)}
        assert {path.name for path in (shipped / folder).iterdir()} == names
    for path in shipped.rglob("*.*h"):  # what they include is there, or is left out by NVRTC
        for name in re.findall(r'#include "([^"]+)"', path.read_text()):
            assert (path.parent / name).is_file() or "/emu/" in name or "/nvrtc/" in name, (path.name, name)


class FakeCupy:
    """The modules of CuPy that are used; NVRTC "compiles" to its own input."""

    def __init__(self) -> None:
        self.calls: list = []
        self.compiled: list = []
        fake = self

        class NVRTCError(RuntimeError):
            pass

        class Device:
            compute_capability = "90"

            def __init__(self, index):
                self.id = index

            def __enter__(self):
                fake.calls.append(("device", self.id))

            def __exit__(self, *_):
                pass

        class Module:
            def load(self, image):
                self.image = image

            def get_function(self, name):
                return types.SimpleNamespace(ptr=77, name=name, image=self.image)

        def compile_program(program, options):
            fake.compiled.append((program, options))
            if "broken" in program["names"]:
                raise NVRTCError("NVRTC_ERROR_COMPILATION")

        self.nvrtc = types.SimpleNamespace(
            NVRTCError=NVRTCError,
            getVersion=lambda: (13, 0),
            createProgram=lambda source, name, headers, includes: {"source": source, "names": []},
            addNameExpression=lambda program, name: program["names"].append(name),
            compileProgram=compile_program,
            getLoweredName=lambda program, name: f"_Z{len(name)}",
            getCUBIN=lambda program: b"\x7fELF\n" + program["source"].encode(),
            getProgramLog=lambda program: "x.cu(3): error: no such thing",
            destroyProgram=lambda program: None,
        )
        note = lambda what: lambda *args: self.calls.append((what, *args))  # noqa: E731
        self.driver = types.SimpleNamespace(launchKernel=note("launch"), funcSetAttribute=note("allow"))
        self.runtime = types.SimpleNamespace(
            memsetAsync=note("fill"),
            memcpyAsync=note("copy"),
            streamSynchronize=note("wait"),
            deviceGetAttribute=lambda which, device: 100 * device + which,
        )
        self.Device, self.Module = Device, Module

    def install(self, monkeypatch, folder):
        cupy, cuda = types.ModuleType("cupy"), types.ModuleType("cupy.cuda")
        cuda.__dict__.update({name: getattr(self, name) for name in ("Device", "Module", "driver", "nvrtc", "runtime")})
        cupy.__dict__["cuda"] = cuda
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
        monkeypatch.setenv("CUPY_CACHE_DIR", str(folder))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        return self


def shape_of(grid, block, shared):
    made = _nvrtc.Shape(shared=shared)
    made.grid[:], made.block[:] = grid, block
    return ctypes.pointer(made)


def test_a_kernel_is_compiled_once_and_launched_as_it_is_asked_for(monkeypatch, tmp_path):
    fake = FakeCupy().install(monkeypatch, tmp_path / "cache")
    device = _nvrtc.CupyDevice()
    file, name = b"csrc/cuda/gram64.cuh", b"pymerge::cuda::gram64_kernel"
    device.launch(file, name, shape_of((7, 2, 1), (256, 1, 1), 0), 0x50, 0x1234)
    device.launch(file, name, shape_of((9, 1, 1), (32, 1, 1), 60_000), None, 0x99)
    device.launch(file, name, shape_of((9, 1, 1), (32, 1, 1), 50_000), None, 0x99)
    assert fake.calls == [
        ("device", 1), ("launch", 77, 7, 2, 1, 256, 1, 1, 0, 0x50, 0x1234, 0),
        ("device", 1), ("allow", 77, 8, 60_000), ("launch", 77, 9, 1, 1, 32, 1, 1, 60_000, 0, 0x99, 0),
        ("device", 1), ("launch", 77, 9, 1, 1, 32, 1, 1, 50_000, 0, 0x99, 0),
    ]  # fmt: skip
    [(program, options)] = fake.compiled
    assert '#include "cuda/gram64.cuh"' in program["source"] and program["names"] == [name.decode()]
    assert {"--fmad=false", "-arch=sm_90", f"-I{_nvrtc.headers()}"} <= set(options)
    assert not any("ftz" in option or "fast" in option for option in options)


def test_memory_and_questions_go_to_torchs_device_and_stream(monkeypatch, tmp_path):
    fake = FakeCupy().install(monkeypatch, tmp_path)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0x50 + device))
    table = _nvrtc.table(_nvrtc.CupyDevice())
    number, stream = ctypes.c_int(), ctypes.c_void_p()
    assert table.attribute(1, 16, ctypes.pointer(number)) == 0 and number.value == 116
    assert table.stream(1, ctypes.pointer(stream)) == 0 and stream.value == 0x51
    assert table.fill(0x1000, 255, 64, stream) == 0 and table.read(0x2000, 0x1000, 4, None) == 0
    assert fake.calls == [
        ("device", 1), ("fill", 0x1000, 255, 64, 0x51),
        ("device", 1), ("copy", 0x2000, 0x1000, 4, 2, 0), ("wait", 0),
    ]  # fmt: skip


def test_compiled_kernels_are_kept_between_processes(monkeypatch, tmp_path):
    fake = FakeCupy().install(monkeypatch, tmp_path / "cache")
    first = _nvrtc.compiled("sketch", "kernel", "80")
    assert _nvrtc.compiled("sketch", "kernel", "80") == first and len(fake.compiled) == 1
    assert first[1].startswith(b"\x7fELF\n")
    assert _nvrtc.compiled("sketch", "kernel", "90") != first or len(fake.compiled) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_errors_of_nvrtc_say_what_did_not_compile(monkeypatch, tmp_path):
    FakeCupy().install(monkeypatch, tmp_path / "cache")
    with pytest.raises(RuntimeError, match=r"broken of sketch\.cuh for sm_80.*\n.*no such thing"):
        _nvrtc.compiled("sketch", "broken", "80")


def test_operators_say_that_nvrtc_compiles_them(monkeypatch):
    monkeypatch.setattr(_load, "has_kernel", lambda name, device: True)
    monkeypatch.setattr(_load, "CUDA", "nvrtc")
    assert implementations() == {name: {"cpu": "native", "cuda": "nvrtc"} for name in OPERATORS}


@pytest.mark.parametrize(("connects", "wanted"), [(True, "nvrtc"), (False, "reference")])
def test_a_cuda_torch_without_cuda_kernels_takes_nvrtc_where_it_can(monkeypatch, recwarn, connects, wanted):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_nvrtc, "connect", lambda: connects)
    if (_load.HERE / "_ops_cuda.so").is_file():
        pytest.skip("this build has CUDA kernels")
    assert _load.load_operators() == wanted
    texts = [str(w.message) for w in recwarn.list]
    assert texts == [] if connects else len(texts) == 1 and 'pip install "pymerge[cuda]"' in texts[0]


def nvrtc():
    pytest.importorskip("cupy", reason="CuPy is not installed")
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except Exception as error:
        pytest.skip(f"NVRTC does not load: {error}")
    return nvrtc


FITS = "template <long... kSizes, class... Types> constexpr bool fits(void (*)(Types...)) {"
FITS += " return sizeof...(kSizes) == sizeof...(Types) && ((sizeof(Types) == kSizes) && ...); }\n"


@NEEDS_LIBRARY
def test_arguments_have_the_sizes_that_nvrtc_gives_them():
    compiler = nvrtc()
    found = _nvrtc.kernels()
    for header in sorted({kernel.header for kernel in found}):
        source = f'#include "cuda/{header}.cuh"\nusing namespace pymerge::cuda;\n{FITS}'
        for kernel in (k for k in found if k.header == header):
            sizes = ", ".join(map(str, kernel.sizes))
            source += f"static_assert(fits<{sizes}>(static_cast<decltype(&{kernel.name})>(nullptr)));\n"
        program = compiler.createProgram(source, f"{header}.cu", (), ())
        try:
            compiler.compileProgram(program, (*_nvrtc.OPTIONS, f"-I{CSRC}", "-arch=compute_90"))
        except compiler.NVRTCError:
            pytest.fail(compiler.getProgramLog(program))


@pytest.mark.slow
@NEEDS_LIBRARY
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_nvrtc_compiles_every_kernel(architecture):
    nvrtc()
    for kernel in _nvrtc.kernels():
        lowered, module = _nvrtc.compile_kernel(kernel.header, kernel.name, architecture)
        assert re.sub(r"<.*", "", kernel.name).rpartition("::")[2] in lowered
        assert lowered.encode() in module and module.startswith(b"\x7fELF")
