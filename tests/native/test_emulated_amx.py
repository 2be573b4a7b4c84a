"""The AMX tiles of cov_accumulate with emulated instructions, against float64."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to build the emulated tiles")
EPS = 2.0**-24


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    built = tmp_path_factory.mktemp("amx") / "emulated_amx.so"
    source = Path(__file__).parent / "emulated_amx.cpp"
    subprocess.run(["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-w", str(source), "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))


def accumulate(library, x, kept, column_kept=None, alpha=1.0):
    cov = torch.full((x.shape[1], x.shape[1]), 3.0)
    rows = torch.tensor(kept, dtype=torch.int64)
    pointer = [ctypes.c_void_p(t.data_ptr()) if t is not None else None for t in (x, rows, column_kept, cov)]
    sizes = [ctypes.c_int64(v) for v in (len(kept), x.shape[1], x.stride(0), x.stride(1))]
    status = library.emulate_cov_amx(pointer[0], pointer[1], pointer[2], *sizes, ctypes.c_float(alpha), pointer[3])
    assert status == 0, "the tiles were not configured, or not released"
    return cov


@pytest.mark.parametrize("shape", [(1, 1), (33, 47), (70, 100), (1100, 49)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_tiles_against_float64(library, shape, transposed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = x.mT.contiguous().mT if transposed else x
    kept = [i for i in range(shape[0]) if i % 3 != 1]
    wanted = torch.ones(shape[1], dtype=torch.bool)
    wanted[1::7] = False
    x[:, ~wanted] = torch.nan
    used = torch.where(wanted, x, 0)[kept].double()
    cov = accumulate(library, x, kept, wanted, alpha=0.5)
    bound = 0.5 * len(kept) * EPS * (used.abs().mT @ used.abs()) + 8 * EPS * (3 + cov.abs())
    assert ((cov - torch.triu(0.5 * used.mT @ used) - 3).abs() <= bound).all()
    assert (cov.tril(-1) == torch.full_like(cov, 3).tril(-1)).all()
