"""scikit-learn's handwritten digits (1797 real images of 8 x 8, part of the package) and the four tasks on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

TRAINING = 1297  # images; the other 500 are the test set
VALIDATION = 500  # of the training images; on them a scale is chosen for each merged update
DIGITS = tuple(str(n) for n in range(10))


@dataclass(frozen=True, kw_only=True)
class Task:
    """One classification problem: what is done to the image [N, 1, 8, 8], and which class each digit belongs to."""

    name: str
    title: str
    view: Callable[[Tensor], Tensor]
    classes: tuple[str, ...]
    class_of_digit: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Digits:
    """images float32 [N, 1, 8, 8] in [-1, 1]; digits int64 [N]; train and test: indices, disjoint; validation: the
    last of train."""

    images: Tensor
    digits: Tensor
    train: Tensor
    test: Tensor

    @property
    def validation(self) -> Tensor:
        return self.train[-VALIDATION:]


def tilted(images: Tensor) -> Tensor:
    """Rotated by 45 degrees; background where the image has no value."""
    c = math.cos(math.pi / 4)
    turn = torch.tensor([[[c, -c, 0.0], [c, c, 0.0]]]).expand(len(images), -1, -1)
    grid = functional.affine_grid(turn, list(images.shape), align_corners=False)
    return functional.grid_sample(images + 1, grid, align_corners=False) - 1


BASE = Task(name="base", title="digits", view=lambda x: x, classes=DIGITS, class_of_digit=tuple(range(10)))
TASKS = (
    Task(
        name="mirrored",
        title="mirrored digits",
        view=lambda x: x.flip(-1),
        classes=DIGITS,
        class_of_digit=tuple(range(10)),
    ),
    Task(name="tilted", title="tilted digits", view=tilted, classes=DIGITS, class_of_digit=tuple(range(10))),
    Task(
        name="parity",
        title="even or odd",
        view=lambda x: x,
        classes=("even", "odd"),
        class_of_digit=tuple(n % 2 for n in range(10)),
    ),
    Task(
        name="large",
        title="upside down: 5 or more",
        view=lambda x: x.flip(-2),
        classes=("0 to 4", "5 to 9"),
        class_of_digit=tuple(int(n >= 5) for n in range(10)),
    ),
)


@cache
def digits() -> Digits:
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1  # stored as 0 .. 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return Digits(images=images, digits=torch.tensor(target), train=order[:TRAINING], test=order[TRAINING:])


def labels(task: Task) -> Tensor:
    """The class of every image, int64 [N]."""
    return torch.tensor(task.class_of_digit)[digits().digits]


@cache
def shifted() -> Tensor:
    """Every image moved by -1, 0 and 1 in both directions: [9, N, 1, 8, 8], the augmentation of the training."""
    wide = functional.pad(digits().images, (1, 1, 1, 1), value=-1.0)
    return torch.stack([wide[..., y : y + 8, x : x + 8] for y in range(3) for x in range(3)])
