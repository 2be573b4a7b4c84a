"""A network whose units have been shuffled is found back: random ones of every kind, and ones trained on digits."""

import copy
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pymerge.align import Permutations, find_permutations
from pymerge.align.random_permutations import random_permutations
from pymerge.align.specs import floating_shapes, spec_for
from pymerge.statistics import reset_batch_norm
from tests.align.vision import CASES, ResNet, TimmVit, Tiny, Vgg, group_norm

KINDS = {
    "conv": (lambda: Vgg(group_norm, channels=1, classes=10), "chain", {"num_groups": 4}),
    "resnet": (lambda: ResNet(((16, 1), (32, 1)), channels=1, classes=10), "resnet", {}),
    "vit": (lambda: TimmVit(chans=1, classes=10), "vit", {"num_heads": 4}),
}


def shuffled(model, spec, seed=0):
    """The same function with its units in another order."""
    permutations = random_permutations(spec, ("a", "b"), torch.Generator().manual_seed(seed))
    return brought(model, permutations)


def brought(model, permutations):
    assert isinstance(permutations, Permutations)
    other = copy.deepcopy(model)
    other.load_state_dict({name: permutations.aligned(name, t, 1) for name, t in model.state_dict().items()})
    return other


def mean(one, other):
    merged = copy.deepcopy(one)
    tensors = other.state_dict()
    merged.load_state_dict({name: (t + tensors[name]) / 2 for name, t in one.state_dict().items()})
    return merged


def distance(one, other):
    tensors = other.state_dict()
    return max(float((t - tensors[name]).abs().max()) for name, t in one.state_dict().items())


@pytest.mark.parametrize("with_data", [True, False], ids=["weights and activations", "weights"])
@pytest.mark.parametrize("name", CASES)
def test_shuffled_units_are_found(name, with_data):
    tiny = Tiny(name, torch.float32)
    spec = spec_for(floating_shapes(tiny.tensors), tiny.case.config, tiny.case.family)
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    other = shuffled(tiny.model, spec)
    assert distance(tiny.model, other) > 0.1
    found = find_permutations([tiny.model, other], [images] if with_data else None, spec=spec)
    assert distance(tiny.model, brought(other, found)) == 0.0


@cache
def digits():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(data.target)[order]


@cache
def trained(kind, seed):
    images, labels = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = KINDS[kind][0]().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(300):
            batch = torch.randint(0, 1400, (64,))
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def spec_of(kind):
    _, family, config = KINDS[kind]
    return spec_for(floating_shapes(trained(kind, 0).state_dict()), config, family)


def accuracy(model: nn.Module) -> float:
    images, labels = digits()
    with torch.inference_mode():
        return float((model(images[1400:]).argmax(-1) == labels[1400:]).double().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_network_is_found_back(kind):
    """Its mean with its shuffled self knows nothing, with the self that is found back all that it knew."""
    model, spec = trained(kind, 0), spec_of(kind)
    other = shuffled(model, spec)
    assert accuracy(model) > 0.85 and accuracy(other) == accuracy(model)
    assert accuracy(mean(model, other)) < 0.5
    found = find_permutations([model, other], digits()[0][:500].split(100), spec=spec)
    assert distance(model, brought(other, found)) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_merging_does_not_depend_on_the_order_of_units(kind):
    """Two seeds: the mean of the aligned models is the same whatever order the second model's units came in, and better
    than without."""
    one, other, spec = trained(kind, 0), trained(kind, 1), spec_of(kind)
    batches = digits()[0][:1000].split(100)
    merged = []
    for second in (other, shuffled(other, spec, seed=5)):
        found = find_permutations([one, second], batches, spec=spec)
        merged.append(mean(one, brought(second, found)))
    assert distance(*merged) < 1e-6
    plain = mean(one, other)
    for model in (plain, merged[0]):
        reset_batch_norm(model, batches)
    assert accuracy(merged[0]) > accuracy(plain) + 0.1
