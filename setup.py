"""Builds the native core. Metadata is in pyproject.toml; what is built:

pymerge/_C            host module (pybind11, no libtorch)
pymerge/_ops.so       torch operators for the CPU (libtorch stable ABI 2.11, no Python symbol)
pymerge/_ops_cuda.so  the same for CUDA; PYMERGE_CUDA = auto (default: if a toolkit and a CUDA torch are found) | 0 | 1
pymerge/_ops_nvrtc.so without that: its launchers alone, for kernels that NVRTC compiles at first use from pymerge/_csrc

PYMERGE_SANITIZE=1 builds the first two with AddressSanitizer and UndefinedBehaviorSanitizer (csrc/sanitize.sh).
"""

import os
from glob import glob

import torch
from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_py import build_py
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

WARNINGS = ["-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"]  # the latter: GCC 12's own intrinsics
FLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", "-ffp-contract=off", *WARNINGS]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
ARCHITECTURES = "8.0;9.0a;10.0+PTX"
HEADERS = ("common/*.h", "cuda/*.cuh")  # of csrc; all that NVRTC reads
KERNELS = sorted(set(glob("csrc/cpu/*.cpp")) - set(glob("csrc/cpu/*_ops.cpp")))


def wants_cuda() -> bool:
    choice = os.environ.get("PYMERGE_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"PYMERGE_CUDA must be auto, 0 or 1, got {choice!r}")
    found = CUDA_HOME is not None and torch.version.cuda is not None
    if choice == "1" and not found:
        raise SystemExit(
            f"PYMERGE_CUDA=1: toolkit {CUDA_HOME}, torch {torch.__version__}, its CUDA {torch.version.cuda}"
        )
    return found and choice != "0"


def extensions() -> list:
    sanitize = SANITIZE if os.environ.get("PYMERGE_SANITIZE") == "1" else []
    flags = [*FLAGS, *sanitize]
    cpu = {"cxx": [*flags, *STABLE_ABI]}
    host = Pybind11Extension(
        "pymerge._C", ["csrc/module.cpp", *KERNELS], extra_compile_args=flags, extra_link_args=sanitize
    )
    sources = ["csrc/schema.cpp", *glob("csrc/cpu/*_ops.cpp"), *KERNELS]
    ops = CppExtension("pymerge._ops", sources, extra_compile_args=cpu, extra_link_args=sanitize, py_limited_api=True)
    built = [host, ops]
    if wants_cuda():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        nvcc = ["-std=c++20", "-O3", "-fmad=false", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA", *STABLE_ABI]
        cuda = {"cxx": cpu["cxx"], "nvcc": nvcc}
        sources = sorted(glob("csrc/cuda/*.cu"))
        built.append(CUDAExtension("pymerge._ops_cuda", sources, extra_compile_args=cuda, py_limited_api=True))
    else:
        nvrtc = {"cxx": [*cpu["cxx"], "-DPYMERGE_NVRTC", "-Wno-unknown-pragmas"]}  # kernels are parsed, not compiled
        sources = sorted(glob("csrc/nvrtc/*.cpp"))
        built.append(CppExtension("pymerge._ops_nvrtc", sources, extra_compile_args=nvrtc, py_limited_api=True))
    return built


class Build(BuildExtension):
    """Operator libraries are plain shared objects: no Python tag in their names."""

    def get_ext_filename(self, fullname: str) -> str:
        name = super().get_ext_filename(fullname)
        return name if fullname.endswith("_C") else os.path.join(*fullname.split(".")) + ".so"


class Python(build_py):
    """The package, and the headers of csrc as pymerge/_csrc."""

    def _get_data_files(self) -> list:
        found = list(super()._get_data_files())
        for pattern in HEADERS:
            folder = os.path.dirname(pattern)
            names = sorted(os.path.basename(path) for path in glob(f"csrc/{pattern}"))
            found.append(("pymerge", f"csrc/{folder}", os.path.join(self.build_lib, "pymerge", "_csrc", folder), names))
        return found


setup(ext_modules=extensions(), cmdclass={"build_ext": Build, "build_py": Python})
