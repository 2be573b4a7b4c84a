"""A small vision transformer on scikit-learn's digits (1797 real images of 8 x 8) and eight tasks fine-tuned from it.

Every task shows the digits in another way, asks something else of them, or both. Heads are trained alone first and then
kept, as frozen text heads are in CLIP's eight-task benchmark: what a task learns is in the encoder, which is merged.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.quality.family import Split
from pymerge.demo.data import DIGITS, Task, digits, labels, shifted, tilted
from pymerge.demo.train import quiet_and_alone

BATCH = 128
TRAINING, VALIDATION = 1097, 200  # images; the other 500 are the test set
OBSERVED, OBSERVED_BATCH = 256, 64
MARK = "trained.json"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Network, epochs and top learning rates; kept beside the checkpoints, so that another schedule trains again."""

    version: int = 1
    width: int = 64
    layers: int = 4
    base_epochs: int = 80
    base_rate: float = 3e-3
    head_epochs: int = 10
    head_rate: float = 5e-3
    task_epochs: int = 20
    task_rate: float = 4e-4


def occluded(images: Tensor) -> Tensor:
    """The lower two of eight rows hidden."""
    return torch.cat((images[..., :6, :], torch.full_like(images[..., 6:, :], -1.0)), dim=-2)


def noisy(images: Tensor) -> Tensor:
    """Noise that depends on the image alone: one of 64 patterns, chosen by its pixels."""
    generator = torch.Generator().manual_seed(8)
    pattern = torch.randn(64, *images.shape[1:], generator=generator)
    which = ((images.flatten(1) + 1) * torch.arange(1, 65)).sum(-1).round().long() % len(pattern)
    return images + 0.3 * pattern[which]


def task(name: str, title: str, view: Callable[[Tensor], Tensor], classes: tuple[int, ...]) -> Task:
    """classes: which class each digit from 0 to 9 belongs to."""
    names = DIGITS if len(set(classes)) == 10 else tuple(f"class {n}" for n in range(max(classes) + 1))
    return Task(name=name, title=title, view=view, classes=names, class_of_digit=classes)


ALL = tuple(range(10))
BASE = task("base", "digits", lambda x: x, ALL)
TASKS = (
    task("rotated", "digits turned by 90 degrees", lambda x: x.rot90(1, (-2, -1)), ALL),
    task("inverted", "digits, black and white exchanged, mirrored", lambda x: -x.flip(-1), ALL),
    task("occluded", "digits tilted by 45 degrees, two rows hidden", lambda x: occluded(tilted(x)), ALL),
    task("noisy", "digits upside down in noise", lambda x: noisy(x.flip(-2)), ALL),
    task("parity", "even or odd, mirrored", lambda x: x.flip(-1), tuple(n % 2 for n in ALL)),
    task("large", "5 or more, turned by 180 degrees", lambda x: x.flip((-2, -1)), tuple(int(n >= 5) for n in ALL)),
    task("shifted", "the digit plus 3, transposed", lambda x: x.mT, tuple((n + 3) % 10 for n in ALL)),
    task("loops", "how many closed loops, tilted by 45 degrees", tilted, (1, 0, 0, 0, 1, 0, 1, 0, 2, 1)),
)
BY_NAME = {task.name: task for task in TASKS}


def splits(seed: int) -> dict[str, Tensor]:
    """Indices of the images, another division for each seed."""
    order = torch.randperm(len(digits().images), generator=torch.Generator().manual_seed(1000 + seed))
    parts = order.split([TRAINING, VALIDATION, len(order) - TRAINING - VALIDATION])
    return dict(zip(("train", "validation", "test"), parts, strict=True))


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """In one of eight orientations, and one time in four with black and white exchanged."""
    turns, mirrored, exchanged = (int(torch.randint(n, (), generator=generator)) for n in (4, 2, 4))
    turned = images.rot90(turns, (-2, -1))
    turned = turned.flip(-1) if mirrored else turned
    return -turned if exchanged == 0 else turned


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moved by -1, 0 or 1 pixels both ways, and a little noise. images: indices."""
    moved = shifted()[torch.randint(0, 9, images.shape, generator=generator), images]
    return moved + 0.1 * torch.randn(moved.shape, generator=generator)


def new_model(of: Task, schedule: Schedule, seed: int) -> ViTForImageClassification:
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=schedule.width,
        num_hidden_layers=schedule.layers,
        num_attention_heads=4,
        intermediate_size=4 * schedule.width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.08,
        id2label=dict(enumerate(of.classes)),
        label2id={name: n for n, name in enumerate(of.classes)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(config)


def fit(
    model: ViTForImageClassification,
    of: Task,
    parameters: Iterable[nn.Parameter],
    images: Tensor,
    cycle: tuple[int, float],
    seed: int,
) -> None:
    """AdamW with one cycle of the learning rate on the images with these indices; cycle: epochs, top rate.

    The base sees each batch in another orientation: it knows a little of most views, as a large model would."""
    epochs, rate = cycle
    parameters, target = list(parameters), labels(of)
    generator = torch.Generator().manual_seed(seed)
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps, pct_start=0.2)
    model.train()
    for _ in range(epochs):
        order = images[torch.randperm(len(images), generator=generator)]
        for batch in order[: steps * BATCH].split(BATCH):
            shown = of.view(augmented(batch, generator))
            shown = varied(shown, generator) if of is BASE else shown
            loss = functional.cross_entropy(model(shown).logits, target[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(model: nn.Module, of: Task, images: Tensor) -> float:
    """Share of the images with these indices that are classified correctly."""
    with torch.no_grad():
        found = model(of.view(digits().images[images])).logits.argmax(-1)
    return (found == labels(of)[images]).double().mean().item()


def head(checkpoint: Path) -> nn.Linear:
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        weight, bias = file.get_tensor("classifier.weight"), file.get_tensor("classifier.bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


class Vision:
    """See the top of this file; a Family."""

    name = "vision"
    metric: Literal["accuracy", "bits per byte"] = "accuracy"
    higher_is_better = True
    tasks: tuple[str, ...] = tuple(task.name for task in TASKS)
    heads = ["classifier.*"]

    def __init__(self, schedule: Schedule | None = None) -> None:
        self.schedule = schedule or Schedule()

    def train(self, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        """A child starts as the base with a head of its own; see fit."""
        mark, settings = folder / MARK, asdict(self.schedule) | {"seed": seed}
        if mark.is_file() and json.loads(mark.read_text()) == settings:
            return
        shutil.rmtree(folder, ignore_errors=True)
        with quiet_and_alone():
            self.train_all(folder, seed, say)
        mark.write_text(json.dumps(settings))

    def train_all(self, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        schedule, parts = self.schedule, splits(seed)
        first = 100 * seed
        base = new_model(BASE, schedule, first)
        fit(base, BASE, base.parameters(), parts["train"], (schedule.base_epochs, schedule.base_rate), first)
        base.save_pretrained(folder / "base")
        say(f"{self.name}, seed {seed}: base {accuracy(base, BASE, parts['test']):.1%} on {BASE.title}")
        for number, of in enumerate((BY_NAME[name] for name in self.tasks), start=first + 1):
            model = new_model(of, schedule, number)
            model.vit.load_state_dict(base.vit.state_dict())
            head, tuned = (schedule.head_epochs, schedule.head_rate), (schedule.task_epochs, schedule.task_rate)
            fit(model, of, model.classifier.parameters(), parts["train"], head, number)
            before = accuracy(model, of, parts["test"])
            fit(model, of, model.vit.parameters(), parts["train"], tuned, number)
            model.save_pretrained(folder / "tasks" / of.name)
            after = accuracy(model, of, parts["test"])
            say(f"{self.name}, seed {seed}: {of.name} {before:.1%} -> {after:.1%} on {of.title}")

    def samples(self, folder: Path, task: str) -> list[dict[str, Tensor]]:
        seen = digits().images[splits(self.seed(folder))["train"][:OBSERVED]]
        return [{"pixel_values": batch} for batch in BY_NAME[task].view(seen).split(OBSERVED_BATCH)]

    def load(self, checkpoint: Path) -> nn.Module:
        return ViTForImageClassification.from_pretrained(checkpoint, local_files_only=True).eval()

    def score(self, network: nn.Module, task: str, folder: Path, split: Split) -> float:
        images = splits(self.seed(folder))[split]
        network.classifier = head(folder / "tasks" / task)
        return accuracy(network, BY_NAME[task], images)

    def seed(self, folder: Path) -> int:
        return json.loads((folder / MARK).read_text())["seed"]
