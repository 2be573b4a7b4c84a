"""What pymerge promises of a method, checked by pymerge; and what these two promise themselves."""

import pytest
import torch

import pymerge
from pymerge.testing import check_method


@pytest.mark.parametrize("name", ["equal_loudness", "low_rank_mean"])
def test_keeps_the_rules_of_methods(name):
    check_method(name)


def test_quiet_tasks_count_as_much_as_loud_ones():
    base, loud, quiet = torch.zeros(2), torch.tensor([4.0, 0.0]), torch.tensor([0.0, 1.0])
    merged = pymerge.merge({"w": base}, [{"w": loud}, {"w": quiet}], method="equal_loudness")
    torch.testing.assert_close(merged["w"], torch.tensor([1.25, 1.25]))  # the mean length is 2.5


def test_keeps_the_strongest_direction():
    base, tuned = torch.zeros(4, 4), torch.diag(torch.tensor([1.0, 5.0, 2.0, 3.0]))
    merged = pymerge.merge({"w": base}, [{"w": tuned}], method="low_rank_mean", rank=0.5)
    torch.testing.assert_close(merged["w"], torch.diag(torch.tensor([0.0, 5.0, 0.0, 3.0])))
