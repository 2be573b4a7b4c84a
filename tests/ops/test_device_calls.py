"""The small calls of benchmarks/device_calls.py: complete, and the same on both devices."""

import importlib.util
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from pymerge.ops import OPERATORS  # noqa: E402

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("device_calls", ROOT / "benchmarks" / "device_calls.py")
assert SPEC is not None and SPEC.loader is not None
device_calls = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(device_calls)
NAMES = [name for name in device_calls.CALLS if name in OPERATORS]


def test_every_operator_with_a_cuda_kernel_has_small_calls():
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    assert set(re.findall(r'm\.impl\("(\w+)"', sources)) <= set(device_calls.CALLS)


@pytest.mark.parametrize("name", NAMES)
def test_calls_are_valid_and_repeatable(name):
    first, second = (device_calls.run(name, "cpu") for _ in range(2))
    assert first and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False")
@pytest.mark.parametrize("name", NAMES)
def test_devices_agree(name):
    """Each operator has its own tests of accuracy; here a device that is plainly wrong shows."""
    for cpu, cuda in zip(*(device_calls.run(name, device) for device in ("cpu", "cuda")), strict=True):
        assert cpu.dtype == cuda.dtype and cpu.shape == cuda.shape
        if not cpu.is_floating_point() or cpu.numel() == 0:
            assert torch.equal(cpu, cuda)
            continue
        wide, other = cpu.double(), cuda.double()
        usual = wide.isfinite()
        assert torch.equal(usual, other.isfinite())
        assert (wide - other)[usual].abs().max() <= 1e-4 * wide[usual].abs().max()
