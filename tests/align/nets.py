"""Small networks with specs written by hand, and what a permutation makes of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pymerge.align import Entry, Permutations, Spec, Tap, Units
from pymerge.align.random_permutations import random_permutations


class Mlp(nn.Module):
    """Three layers; positive biases, so that few units are dead."""

    def __init__(self, seed: int, sizes: tuple[int, ...] = (10, 24, 20, 6)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for at, (into, out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            layer = nn.Linear(into, out)
            with torch.no_grad():
                layer.weight.copy_(torch.randn(out, into, generator=generator) / into**0.5)
                layer.bias.copy_(torch.randn(out, generator=generator) * 0.2 + 0.5)
            setattr(self, f"fc{at}", layer)
        self.layers = len(sizes) - 1

    def forward(self, x: Tensor) -> Tensor:
        for at in range(self.layers):
            x = getattr(self, f"fc{at}")(x)
            x = x.relu() if at < self.layers - 1 else x
        return x


def mlp_spec(sizes: tuple[int, ...] = (10, 24, 20, 6), blocks: int = 1) -> Spec:
    return Spec(
        groups=tuple(
            Units(
                name=f"h{at}",
                size=size,
                blocks=blocks,
                entries=(
                    Entry(parameter=f"fc{at}.weight", axis=0, role="out"),
                    Entry(parameter=f"fc{at}.bias", axis=0, role="out"),
                    Entry(parameter=f"fc{at + 1}.weight", axis=1, role="in"),
                ),
                taps=(Tap(module=f"fc{at + 1}"),),
            )
            for at, size in enumerate(sizes[1:-1])
        ),
        fixed=(f"fc{len(sizes) - 2}.bias",),
    )


def scrambled(model: nn.Module, spec: Spec, seed: int) -> tuple[dict[str, Tensor], Permutations]:
    """The model's parameters with units in another order, and that order (row 1)."""
    order = random_permutations(spec, ("a", "b"), torch.Generator().manual_seed(seed))
    return {name: order.aligned(name, p.detach(), 1) for name, p in model.state_dict().items()}, order


def merged(found: Permutations, states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the aligned models."""
    return {
        name: torch.stack([found.aligned(name, state[name], t) for t, state in enumerate(states)]).mean(0)
        for name in states[0]
    }
