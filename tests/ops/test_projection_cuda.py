"""The projections on CUDA against the CPU, in both precisions."""

import pytest

pytestmark = pytest.mark.device
torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)

from pymerge.ops.project_delta import project_delta  # noqa: E402
from pymerge.ops.projection_stats import projection_stats  # noqa: E402
from tests.ops.test_projection import SHAPES, case  # noqa: E402

LIMIT = {"fp32": 3e-6, "bf16x3": 5e-6}


@pytest.mark.parametrize("shape", [*SHAPES, (4096, 512, 70)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16x3"])
def test_against_the_cpu(shape, dtype, precision):
    basis, base, tuned, rows = case(*shape, dtype)
    want = project_delta(basis, base, tuned).double()
    there = basis.cuda(), base.cuda(), [x.cuda() for x in tuned]
    got = project_delta(*there, precision=precision).cpu().double()
    assert (got - want).norm() <= LIMIT[precision] * want.norm()
    want = projection_stats(basis, rows, base, tuned)
    got = projection_stats(there[0], rows.cuda(), *there[1:], precision=precision)
    again = projection_stats(there[0], rows.cuda(), *there[1:], precision=precision)
    size = rows.double().norm(dim=2) * want[1].sqrt()
    assert ((got[0].cpu() - want[0]).norm() <= 2 * LIMIT[precision] * size.norm()).all()
    assert (got[1].cpu() - want[1]).norm() <= 2 * LIMIT[precision] * want[1].norm()
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
