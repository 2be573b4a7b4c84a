"""What a family of models is to the quality suite: a base, its fine-tuned tasks, and how good a network is at each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor, nn

Split = Literal["validation", "test"]  # scales are chosen on the first, figures are of the second


class Family(Protocol):
    """One architecture, one pre-trained base, several tasks. Offline and deterministic: data of this machine, seeds,
    one thread."""

    name: str
    metric: Literal["accuracy", "bits per byte"]
    higher_is_better: bool
    tasks: tuple[str, ...]
    heads: list[str]  # globs of the tensors that each task keeps for itself: they stay out of the merge

    def train(self, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        """folder/base and folder/tasks/NAME as checkpoints, unless they are there from the same settings."""
        ...

    def samples(self, folder: Path, task: str) -> list[dict[str, Tensor]]:
        """Batches of the task's training inputs that its own model is observed on; `folder` as given to `train`."""
        ...

    def load(self, checkpoint: Path) -> nn.Module:
        """The network of a checkpoint of this family, in evaluation mode, in float32."""
        ...

    def score(self, network: nn.Module, task: str, folder: Path, split: Split) -> float:
        """`metric` of a network on a task, with the head of the task's own model where tasks have heads."""
        ...
