"""Training and evaluation of the demo's small vision transformers. Deterministic: seeds, one thread."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging as transformers_logging

import pymerge
from pymerge.demo.data import BASE, TASKS, Task, digits, labels, shifted

BATCH = 128
# What merged updates are multiplied by: authors search it for most methods, ESM's on [0, 2]
SCALES = (0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0)
OBSERVED = 32  # images of each task that its own model is run on for statistics
MARK = "trained.json"
STATISTICS = "statistics"

Heads = dict[str, nn.Linear | nn.Identity]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Epochs and top learning rates; kept beside the checkpoints, so that another schedule trains again."""

    version: int = 1
    base_epochs: int = 40
    base_rate: float = 3e-3
    head_epochs: int = 5
    head_rate: float = 3e-3
    task_epochs: int = 15
    task_rate: float = 1e-3


def new_model(task: Task, seed: int) -> ViTForImageClassification:
    """3 layers of width 64 over four patches of 4 x 4: 0.1 M parameters."""
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.08,
        id2label=dict(enumerate(task.classes)),
        label2id={name: n for n, name in enumerate(task.classes)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(config)


def fit(
    model: ViTForImageClassification,
    task: Task,
    parameters: Iterable[nn.Parameter],
    epochs: int,
    rate: float,
    seed: int,
) -> None:
    """AdamW with one cycle of the learning rate on randomly shifted images."""
    parameters = list(parameters)
    generator = torch.Generator().manual_seed(seed)
    target = labels(task)
    steps = len(digits().train) // BATCH
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps, pct_start=0.2)
    model.train()
    for _ in range(epochs):
        order = digits().train[torch.randperm(len(digits().train), generator=generator)]
        for batch in order[: steps * BATCH].split(BATCH):
            shift = torch.randint(0, 9, (BATCH,), generator=generator)
            logits = model(task.view(shifted()[shift, batch])).logits
            loss = functional.cross_entropy(logits, target[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(model: ViTForImageClassification, task: Task, images: Tensor) -> float:
    """Share of the images with these indices that are classified correctly."""
    with torch.no_grad():
        found = model.eval()(task.view(digits().images[images])).logits.argmax(-1)
    return (found == labels(task)[images]).double().mean().item()


def load(folder: Path) -> ViTForImageClassification:
    return ViTForImageClassification.from_pretrained(folder, local_files_only=True)


def load_heads(models: Path) -> Heads:
    return {task.name: load(models / task.name).classifier for task in TASKS}


def accuracies(encoder: Path, models: Path) -> dict[str, float]:
    """On the test images, of the encoder in one checkpoint with the heads of the tasks' models: see accuracies_on."""
    return accuracies_on(digits().test, load(encoder), load_heads(models))


def accuracies_on(images: Tensor, model: ViTForImageClassification, heads: Heads) -> dict[str, float]:
    """Accuracy on each task of the encoder of one model, with the head of that task's own model."""
    out = {}
    for task in TASKS:
        model.classifier = heads[task.name]
        out[task.name] = accuracy(model, task, images)
    return out


def rescaled(
    base: ViTForImageClassification, merged: ViTForImageClassification, heads: Heads
) -> tuple[float, dict[str, float]]:
    """base + s (merged - base) with the s of SCALES that has the best mean accuracy on the validation images.

    Returns s (the first of equals) and the accuracies on the test images."""
    start, end = base.vit.state_dict(), merged.vit.state_dict()
    model = copy.deepcopy(base)

    def at(scale: float, images: Tensor) -> dict[str, float]:
        model.vit.load_state_dict({key: start[key] + scale * (end[key] - start[key]) for key in start})
        return accuracies_on(images, model, heads)

    found = {scale: sum(at(scale, digits().validation).values()) for scale in SCALES}
    best = max(found, key=found.__getitem__)
    return best, at(best, digits().test)


@contextmanager
def quiet_and_alone():
    """No progress bars; one thread: the same sums in the same order everywhere, and no waiting at this size."""
    transformers_logging.disable_progress_bar()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_all(out: Path, say: Callable[[str], None], schedule: Schedule | None = None) -> bool:
    """out/base and out/tasks/<name>, unless they are there from the same schedule. Returns whether it trained anything.

    A child starts as the base with a head of its own; the head is trained alone first (linear probe) and then kept, so
    that what the task learns is in the encoder, the part that is merged."""
    schedule = schedule or Schedule()
    mark = out / MARK
    if mark.is_file() and json.loads(mark.read_text()) == asdict(schedule):
        return False
    mark.unlink(missing_ok=True)
    for name in ("base", "tasks", STATISTICS):
        shutil.rmtree(out / name, ignore_errors=True)
    base = new_model(BASE, seed=0)
    fit(base, BASE, base.parameters(), schedule.base_epochs, schedule.base_rate, seed=0)
    base.save_pretrained(out / "base")
    say(f"base: {accuracy(base, BASE, digits().test):.1%} on {BASE.title}")
    for number, task in enumerate(TASKS, start=1):
        model = new_model(task, seed=number)
        model.vit.load_state_dict(base.vit.state_dict())
        if task.classes == BASE.classes:
            model.classifier.load_state_dict(base.classifier.state_dict())
        else:
            fit(model, task, model.classifier.parameters(), schedule.head_epochs, schedule.head_rate, seed=10 + number)
        before = accuracy(model, task, digits().test)
        fit(model, task, model.vit.parameters(), schedule.task_epochs, schedule.task_rate, seed=20 + number)
        model.save_pretrained(out / "tasks" / task.name)
        say(f"{task.name}: {before:.1%} -> {accuracy(model, task, digits().test):.1%} on {task.title}")
    mark.write_text(json.dumps(asdict(schedule)))
    return True


def observe_all(out: Path) -> list[Path]:
    """out/statistics/<name>.safetensors, unless they are there: what each task's own model sees in training images."""
    files = [out / STATISTICS / f"{task.name}.safetensors" for task in TASKS]
    (out / STATISTICS).mkdir(exist_ok=True)
    for task, file in zip(TASKS, files, strict=True):
        if not file.is_file():
            pymerge.observe(out / "tasks" / task.name, [samples(task)]).save(file)
    return files


def samples(task: Task) -> dict[str, Tensor]:
    """The training images of a task that its model is observed on."""
    return {"pixel_values": task.view(digits().images[digits().train[:OBSERVED]])}
