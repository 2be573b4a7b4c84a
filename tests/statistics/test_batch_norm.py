"""Running statistics after a reset are those of the batches, and nothing else of the model has changed."""

import pytest
import torch
from torch import nn

import pymerge
from pymerge.errors import InputError


def network():
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.01), nn.Dropout(0.5)
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5))


def batches(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 6, 6, generator=generator) * 2 + 1 for size in sizes]


def test_running_statistics_are_means_over_the_batches():
    model = network().train()
    model[1].eval()  # modes that differ, as of a frozen norm
    with torch.no_grad():
        model[1].running_mean.fill_(7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = batches(8, 8, 6)
    assert pymerge.reset_batch_norm(model, data) == 2
    seen, hidden = [], []
    with torch.no_grad():
        for x in data:
            y = model[0](x)
            seen.append((y.mean((0, 2, 3)), y.var((0, 2, 3))))
            own = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
            z = model[4](own.flatten(1))  # no dropout
            hidden.append((z.mean(0), z.var(0)))
    for norm, moments in ((model[1], seen), (model[5], hidden)):
        mean, variance = (torch.stack(values).mean(0) for values in zip(*moments, strict=True))
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, variance)
        assert norm.num_batches_tracked == 3
    assert (model[1].momentum, model[5].momentum) == (0.01, 0.1)
    assert [module.training for module in model] == [True, False, True, True, True, True]
    for name, tensor in model.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(tensor, before[name])


def test_scaled_weights_are_made_up_for():
    """The outputs of a network whose weights in front of a norm have shrunk, as those of averages do, come back."""
    model = network().eval()
    data = batches(16, 16)
    pymerge.reset_batch_norm(model, data)
    wanted = model(data[0])
    with torch.no_grad():
        model[0].weight.mul_(0.25)
        model[0].bias.mul_(0.25)
    assert (model(data[0]) - wanted).abs().max() > 0.1
    pymerge.reset_batch_norm(model, data)
    torch.testing.assert_close(model(data[0]), wanted, rtol=1e-3, atol=1e-3)


def test_models_without_batch_norms_are_not_run():
    def never():
        raise AssertionError
        yield

    assert pymerge.reset_batch_norm(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), never()) == 0
    assert pymerge.reset_batch_norm(nn.BatchNorm1d(3, track_running_stats=False), never()) == 0


def test_no_batch_is_an_error_and_modes_come_back():
    model = network().train()
    model[1].num_batches_tracked.fill_(5)
    with pytest.raises(InputError, match="there is no batch"):
        pymerge.reset_batch_norm(model, [])
    assert model[1].num_batches_tracked == 5  # as it was
    with pytest.raises(RuntimeError):
        pymerge.reset_batch_norm(model, [torch.zeros(2, 5, 6, 6)])
    assert all(module.training for module in model.modules()) and model[1].momentum == 0.01
