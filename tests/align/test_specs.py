"""Specs preserve the function, and no entry of them can be left out."""

import pytest
import torch
from tests.align.tiny import MODELS, Tiny, scrambled

from pymerge.align.specs import spec_for

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", MODELS)
def test_any_allowed_permutation_preserves_the_function(name, tmp_path):
    tiny = Tiny(name, tmp_path, torch.float32)
    spec = spec_for(tiny.shapes, tiny.config)
    permutations = scrambled(spec)
    permutations.check()
    c = tiny.change(permutations)
    print(name, c)
    assert c < 1e-5
