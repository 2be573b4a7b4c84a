"""The CUDA projection kernels, run on the CPU by an emulator, against float64."""

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest

import tests.native.emulated as e
from tests.native.emulated import CODES, Stored, store

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to build the emulated kernels")
SOURCE = Path(__file__).parent / "emulated_projection.cpp"


class ProjectFields(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("basis", "base", "tuned", "reference", "out")),
        *((name, ctypes.c_int64) for name in ("m", "n", "r", "basis_step", "reference_step")),
        *((name, ctypes.c_int32) for name in ("tasks", "dtype", "split", "aligned")),
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return e.build(tmp_path_factory.mktemp("emulated"), SOURCE)


@pytest.fixture(params=e.ORDERS)
def library(request, built):
    """Every order of the threads of a block gives the same bits."""
    built.set_order(request.param, seed=1)
    return built


def widened(x: Stored) -> np.ndarray:
    if x.code == "BF16":
        return (x.array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.array.astype(np.float64)


class Case:
    def __init__(self, m, n, r, tasks, code="BF16", offset=0, batched=True, with_base=True):
        rng = np.random.default_rng(m + n + r)
        start = rng.standard_normal(m * n).astype(np.float32) * 0.02
        self.shape, self.code, self.batched, self.aligned = (tasks, m, n, r), code, batched, offset == 0
        self.base = store(start, code, offset) if with_base else None
        noise = (rng.standard_normal((tasks, m * n)) * 0.001).astype(np.float32)
        self.tuned = [store(start + x, code, offset) for x in noise]
        self.basis = rng.standard_normal((tasks if batched else 1, m, r)).astype(np.float32)
        self.reference = rng.standard_normal((tasks if batched else 1, r, n)).astype(np.float32)

    @property
    def truth(self) -> np.ndarray:
        _, m, n, _ = self.shape
        base = 0.0 if self.base is None else widened(self.base)
        d = np.stack([(widened(x) - base).reshape(m, n) for x in self.tuned])
        return self.basis.astype(np.float64).transpose(0, 2, 1) @ d

    def run(self, library, split: bool, stats: bool) -> np.ndarray:
        tasks, m, n, r = self.shape
        out = np.full((2, tasks, r) if stats else (tasks, r, n), np.nan, np.float64 if stats else np.float32)
        pointers = (ctypes.c_void_p * tasks)(*[x.address for x in self.tuned])
        fields = ProjectFields(
            basis=self.basis.ctypes.data,
            base=0 if self.base is None else self.base.address,
            tuned=ctypes.addressof(pointers),
            reference=self.reference.ctypes.data if stats else 0,
            out=out.ctypes.data,
            m=m, n=n, r=r, tasks=tasks,
            basis_step=m * r if self.batched else 0,
            reference_step=r * n if self.batched else 0,
            dtype=CODES[self.code], split=int(split), aligned=int(self.aligned),
        )  # fmt: skip
        library.emulate_projection(ctypes.byref(fields))
        return out


def allowed(m: int, split: bool) -> float:
    """Relative to sum |q| |d|. float32: half a unit a step of the chain; split: what two bfloat16 terms leave out."""
    return m * 2.0**-24 + (3 * 2.0**-17 if split else 0.0)


CASES = {
    "one": (1, 1, 1, 1),
    "odd": (37, 131, 5, 2),
    "vectors": (40, 136, 66, 2),
    "tiles": (64, 128, 64, 1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("split", [False, True], ids=["fp32", "bf16x3"])
@pytest.mark.parametrize("batched", [False, True], ids=["shared", "batched"])
def test_against_float64(library, name, split, batched):
    case = Case(*CASES[name], batched=batched, with_base=not (batched and split))
    truth = case.truth
    error = np.abs(case.run(library, split, stats=False) - truth)
    size = np.abs(case.basis.astype(np.float64)).transpose(0, 2, 1) @ np.abs(
        np.stack([widened(x) - (0 if case.base is None else widened(case.base)) for x in case.tuned])
    ).reshape(case.shape[0], *case.shape[1:3])
    assert (error <= allowed(case.shape[1], split) * size).all()
    inner, square = case.run(library, split, stats=True)
    p, norm = case.reference.astype(np.float64), np.sqrt((truth**2).sum(2))
    slack = 2 * allowed(case.shape[1], split) * np.sqrt((size**2).sum(2))
    assert (np.abs(inner - (truth * p).sum(2)) <= slack * np.sqrt((p**2).sum(2))).all()
    assert (np.abs(square - norm**2) <= slack * (2 * norm + slack)).all()


@pytest.mark.parametrize("code", ["F16", "F32", "F64"])
@pytest.mark.parametrize("offset", [0, 3])
def test_dtypes_and_places(library, code, offset):
    case = Case(33, 136, 9, 1, code, offset)
    truth = case.truth
    for split in (False, True):
        error = np.linalg.norm(case.run(library, split, stats=False) - truth) / np.linalg.norm(truth)
        # float64 weights are rounded to float32 before they are subtracted
        rounding = 2.0**-24 * 0.02 / 0.001 * 2 if code == "F64" else 0.0
        assert error <= rounding + (5e-6 if split else 33 * 2.0**-24)


def test_more_tasks_than_a_launch_carries(library):
    case = Case(8, 16, 3, 18, batched=False)
    truth = case.truth
    assert np.linalg.norm(case.run(library, True, stats=False) - truth) <= 5e-6 * np.linalg.norm(truth)


def test_orders_of_threads_agree_bit_for_bit(built):
    case, outputs = Case(70, 131, 65, 1), []
    for order in e.ORDERS:
        built.set_order(order)
        outputs.append([case.run(built, split, stats).tobytes() for split in (False, True) for stats in (False, True)])
    assert outputs[0] == outputs[1] == outputs[2]
