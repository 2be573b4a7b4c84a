"""Which row of which model becomes which row."""

import numpy as np
import pytest

from pymerge.errors import InputError
from pymerge.recipe.models import ModelRef
from pymerge.recipe.tokenizer import TokenRule
from pymerge.vocabulary.plan import Known, plan_rows

REF = ModelRef(path="a", value="a")
MODELS = [{"x": 0, "y": 1, "z": 2}, {"y": 0, "z": 1, "u": 2}, {"x": 0, "u": 1, "v": 2, "far": 9}]
TOKENS = {token: i for i, token in enumerate(("z", "x", "y", "u", "v", "none", "far"))}
LABELS = ("a", "b", "c")


def planned(rules=None, base=None):
    return plan_rows(TOKENS, Known(labels=LABELS, tokens=MODELS, sizes=[3, 3, 5]), base, rules or {})


def sources(plan):
    """Per row the (model, row) that it is the mean of."""
    found = [set() for _ in range(plan.tokens)]
    for share in plan.shares:
        assert (np.diff(share.places) > 0).all()
        for place, row in zip(share.places, share.index, strict=True):
            found[place].add((share.model, int(row)))
    return found


def test_own_rows_then_the_only_model_then_the_mean():
    a, b, c = planned()
    #                    z         x         y         u                 v         none   far: behind c's last row
    assert sources(a) == [{(0, 2)}, {(0, 0)}, {(0, 1)}, {(1, 2), (2, 1)}, {(2, 2)}, set(), set()]
    assert sources(b) == [{(1, 1)}, {(0, 0), (2, 0)}, {(1, 0)}, {(1, 2)}, {(2, 2)}, set(), set()]
    assert sources(c) == [{(0, 2), (1, 1)}, {(2, 0)}, {(0, 1), (1, 0)}, {(2, 1)}, {(2, 2)}, set(), set()]
    assert a.counts == {"own": 3, "from": {2: 1}, "mean": 1, "zero": 2}
    assert c.counts == {"own": 3, "from": {}, "mean": 2, "zero": 2}


def test_the_base_comes_before_the_mean():
    a, b, c = planned(base=0)
    assert sources(c)[TOKENS["z"]] == {(0, 2)} and sources(b)[TOKENS["x"]] == {(0, 0)}
    assert sources(a)[TOKENS["u"]] == {(1, 2), (2, 1)}  # which the base lacks
    assert sources(a)[TOKENS["v"]] == {(2, 2)}  # which one model alone has


def test_rules():
    rules = {
        "x": (TokenRule(model=REF), 2),  # in models that lack it
        "y": (TokenRule(model=REF, force=True), 1),  # in all
        "z": (TokenRule(kind="zero", force=True), None),
        "u": (TokenRule(kind="model_token", model=REF, token="y"), 0),
        "none": (TokenRule(kind="model_token", model=REF, token=4), 2),
    }
    a, b, c = planned(rules)
    assert sources(a) == [set(), {(0, 0)}, {(1, 0)}, {(0, 1)}, {(2, 2)}, {(2, 4)}, set()]
    assert sources(b) == [set(), {(2, 0)}, {(1, 0)}, {(1, 2)}, {(2, 2)}, {(2, 4)}, set()]
    assert sources(c) == [set(), {(2, 0)}, {(1, 0)}, {(2, 1)}, {(2, 2)}, {(2, 4)}, set()]
    assert b.counts == {"own": 1, "from": {1: 1, 2: 3}, "mean": 0, "zero": 2}


@pytest.mark.parametrize(
    ("rule", "source", "message"),
    [
        (TokenRule(model=REF), 0, "tokens: u: u is unknown to its source a, which has 3 rows"),
        (TokenRule(kind="model_token", model=REF, token="w"), 1, "tokens: u: w is unknown to its source b"),
        (TokenRule(kind="model_token", model=REF, token="far"), 2, "tokens: u: far is unknown to its source c"),
        (TokenRule(kind="model_token", model=REF, token=5), 2, "token 5 is unknown to its source c, which has 5 rows"),
        (TokenRule(), None, r"tokens: u: has no source, and a lack it"),
    ],
)
def test_rules_that_cannot_be_kept(rule, source, message):
    with pytest.raises(InputError, match=message):
        planned({"u": (rule, source)})


def test_a_rule_without_effect_needs_no_source():
    everywhere = Known(labels=("a", "b"), tokens=[{"x": 0}, {"x": 1, "y": 0}], sizes=[1, 2])
    a, b = plan_rows({"x": 0}, everywhere, None, {"x": (TokenRule(), None)})
    assert a.keeps(0, 1) and not b.keeps(1, 2)
