"""CUDA kernels where pymerge was built without nvcc: CuPy's NVRTC compiles each at its first launch, by itself.

`pymerge info` shows which operators run so ("nvrtc"). Compiling takes a second or two a kernel, once: results are kept
in CuPy's folder of compiled kernels (CUPY_CACHE_DIR). To have all of them before the first merge, in an image say:

    python -m pymerge.integrations.cupy          # for the devices that are here; or: ... 80 90 100
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from pymerge.ops import _nvrtc


def compile_kernels(architectures: Sequence[str] = ()) -> int:
    """Compiles every kernel for compute capabilities such as "90" (default: those of the devices that are here).

    Returns  how many kernels there are
    Cost     about a minute an architecture; nothing where they are compiled already. Needs no device.
    Raises   ImportError (CuPy or NVRTC is missing; this build has no launchers); RuntimeError (NVRTC's log)."""
    if not _nvrtc.LIBRARY.is_file():
        raise ImportError(f"{_nvrtc.LIBRARY} is not there: pymerge was built with CUDA kernels, or not built at all")
    cuda = importlib.import_module("cupy.cuda")
    devices = range(0 if architectures else cuda.runtime.getDeviceCount())
    chosen = architectures or sorted({cuda.Device(i).compute_capability for i in devices})
    found = _nvrtc.kernels()
    for architecture in chosen:
        for kernel in found:
            _nvrtc.compiled(kernel.header, kernel.name, architecture)
    return len(found)


if __name__ == "__main__":
    print(f"{compile_kernels(sys.argv[1:])} kernels compiled")
