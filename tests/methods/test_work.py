"""What steps say that they compute, against counted operations and by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pymerge import methods
from pymerge.linalg import polar
from pymerge.methods import work
from pymerge.methods.base import Combine, TaskGroup, TensorInfo
from pymerge.methods.work import Work


def in_place(total, a, b, out_shape=None, **_) -> int:
    """Operations of total.addmm_(a, b), given the shapes: torch counts those that make a new tensor."""
    return 2 * a[0] * a[1] * b[1]


def counted(run) -> int:
    """Operations of torch's products; factorisations and native kernels are not among them."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        run()
    return counter.get_total_flops()


def group(m: int, n: int, tasks: int) -> TaskGroup:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(m, n, generator=generator)
    tuned = tuple(base + 0.1 * torch.randn(m, n, generator=generator) for _ in range(tasks))
    return TaskGroup(info=TensorInfo(name="w", shape=(m, n), tasks=tasks), base=base, tuned=tuned)


def test_sums_and_multiples():
    a = Work(single=1.0, double=2.0) + Work(double=3.0, eigen=4.0, touched=5.0)
    assert a == Work(single=1.0, double=5.0, eigen=4.0, touched=5.0)
    assert a.times(2) == Work(single=2.0, double=10.0, eigen=8.0, touched=10.0)
    assert a.flops == 10.0


def test_by_hand():
    assert work.passes(100, 3) == Work(touched=2400.0)
    assert work.gram(10, 20) == Work(double=2000.0)
    assert work.cholesky_solve(30, 4) == Work(double=2.5 * 9000 + 7200)
    assert work.eigen(10) == Work(eigen=9000.0 + 150000.0)
    assert work.eigen(10, single=True) == work.eigen(10).times(0.5)
    assert work.truncated(20, 10, 5) == work.gram(10, 20) + work.eigen(10, 0.5) + Work(double=2000.0)
    assert work.truncated(20, 10, 5) == work.truncated(10, 20, 5)
    assert work.truncated(4096, 2048, 128) == Work(single=48.0 * 2048 * 4096 * 256)  # iterated


@pytest.mark.parametrize(("m", "n", "route"), [(640, 512, "rotated"), (512, 640, "rotated"), (2048, 256, "halley")])
def test_products_of_polar_factors(m, n, route):
    a = torch.randn(m, n, generator=torch.Generator().manual_seed(1))
    found = []
    flops = counted(lambda: found.append(polar(a)))
    assert found[0].methods == (route,)
    factorised = 4 * min(m, n) ** 3 if route == "halley" else 0  # two inverses, which torch does not count
    assert work.polar(m, n).single == pytest.approx(flops + factorised, rel=0.2)


@pytest.mark.parametrize(("m", "n"), [(96, 64), (64, 96)])
def test_wudi_counts_every_product(m, n):
    step, seen = methods.get("wudi")(steps=20), group(m, n, 3)
    assert step.work(seen.info).single == counted(lambda: step.combine(seen))


@pytest.mark.parametrize(("m", "n"), [(1152, 800), (800, 960)])
def test_ace_counts_its_products(m, n):
    """Of one precision; updates of full rank stay in float32."""
    step, seen = methods.get("ace")(), group(m, n, 2)
    flops = counted(lambda: step.combine(seen))
    assert seen.notes.facts["precision"] == "float32"
    said = step.work(seen.info)
    solve = work.cholesky_solve(n, m).double  # triangular solves and Cholesky are not counted
    assert said.single - solve == pytest.approx(flops, rel=0.2)
    assert said.double == said.single


def test_tsv_m_counts_its_products():
    step, seen = methods.get("tsv_m")(), group(640, 512, 2)
    flops = counted(lambda: step.combine(seen))
    said = step.work(seen.info)
    assert said.single + 2 * 2 * 512 * 640 * 256 == pytest.approx(flops, rel=0.25)  # and the other side's vectors


@pytest.mark.parametrize("name", methods.list())
def test_more_is_more(name):
    """Of every method, with tasks and with size."""
    cls = methods.get(name)
    step = cls(**({"t": 0.5} if name in ("slerp", "nearswap") else {}))

    def seconds(tasks: int, *shape: int) -> float:
        found = step.work(TensorInfo(name="w", shape=shape, tasks=tasks))
        assert min(found) >= 0.0
        return found.flops + found.touched

    assert seconds(2, 512, 512) <= seconds(4, 512, 512)
    assert seconds(2, 512, 512) <= seconds(2, 1024, 512) <= seconds(2, 1024, 1024)
    if cls.spectral and issubclass(cls, Combine):
        assert seconds(2, 1024, 1024) > 6 * seconds(2, 512, 512) > 0  # cubic, but for passes
