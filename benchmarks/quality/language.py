"""The language family: a small byte-level Llama, and six models fine-tuned from it, each on one kind of text."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality.family import Split
from benchmarks.quality.text import KINDS, Texts, texts
from pymerge.demo.train import quiet_and_alone

MARK = "trained.json"
TEXT = "text.safetensors"
SCORED = 64  # windows of a held-out part that a score is the mean of
OBSERVED = 32  # windows of a task's training text that its own model is run on for statistics


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides what is trained, except the seed and the text; kept beside the checkpoints."""

    version: int = 1
    width: int = 128
    inner: int = 384
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    window: int = 128  # bytes that the model sees
    batch: int = 12  # windows a step
    base_steps: int = 250
    base_rate: float = 4e-3
    task_steps: int = 60
    task_rate: float = 1e-3


class Language:
    """0.85 M parameters over bytes: four layers with grouped queries, RMSNorm, SwiGLU and an untied head. All of it is
    merged. The base has seen a little of every kind; the seeds share it and differ in the fine-tuning.

    Cost  one processor: 1 minute for the base, 1.2 a seed; 0.3 s a score"""

    name = "language"
    metric: Literal["accuracy", "bits per byte"] = "bits per byte"
    higher_is_better = False
    tasks = tuple(KINDS)
    heads: list[str] = []

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def train(self, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        """See Family.train; the base is trained once, beside `folder`, for all seeds.

        Raises  MergeError: packages that the text comes from are missing"""
        found = texts()
        made_of = {"settings": asdict(self.settings), "text": fingerprint(found), "seed": seed}
        if is_marked(folder, made_of):
            return
        with quiet_and_alone():
            base = self.pretrained(folder.parent / "pretrained", found, say)
            start_over(folder)
            shutil.copytree(base, folder / "base")
            save_text(found, folder / TEXT)
            network = self.load(base)
            for number, task in enumerate(self.tasks):
                tuned = copy.deepcopy(network)
                text = as_tensor(found[task]["training"])
                self.fit(tuned, [text], self.settings.task_steps, self.settings.task_rate, seed=100 * seed + number)
                tuned.save_pretrained(folder / "tasks" / task)
                before, after = (self.score(model, task, folder, "validation") for model in (network, tuned))
                say(f"language, seed {seed}, {task}: {before:.3f} -> {after:.3f} bits per byte")
        (folder / MARK).write_text(json.dumps(made_of))

    def samples(self, folder: Path, task: str) -> list[dict[str, Tensor]]:
        """See Family.samples: one batch, input_ids [OBSERVED, window], windows spread evenly over the training text."""
        return [{"input_ids": spread(read_text(folder, task, "training"), OBSERVED, self.settings.window)}]

    def load(self, checkpoint: Path) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(checkpoint, local_files_only=True, dtype=torch.float32).eval()

    def score(self, network: nn.Module, task: str, folder: Path, split: Split) -> float:
        """Bits per byte on windows spread evenly over the held-out documents: of all bytes but each window's first."""
        windows = spread(read_text(folder, task, split), SCORED, self.settings.window + 1)
        with torch.no_grad():
            losses = [loss(network, batch).item() * len(batch) for batch in windows.split(32)]
        return sum(losses) / len(windows) / math.log(2)

    def pretrained(self, folder: Path, found: Texts, say: Callable[[str], None]) -> Path:
        """The base's checkpoint, trained if it is not there from the same settings and text."""
        settings = {key: value for key, value in asdict(self.settings).items() if not key.startswith("task_")}
        made_of = {"settings": settings, "text": fingerprint(found)}
        if not is_marked(folder, made_of):
            start_over(folder)
            network = self.new_network()
            mixture = [as_tensor(found[task]["pretraining"]) for task in self.tasks]
            say(f"language: training the base, {self.settings.base_steps} steps")
            self.fit(network, mixture, self.settings.base_steps, self.settings.base_rate, seed=0)
            network.save_pretrained(folder / "base")
            (folder / MARK).write_text(json.dumps(made_of))
        return folder / "base"

    def new_network(self) -> LlamaForCausalLM:
        settings = self.settings
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=settings.width,
            intermediate_size=settings.inner,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.key_value_heads,
            max_position_embeddings=2 * settings.window,
            initializer_range=0.05,
            tie_word_embeddings=False,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LlamaForCausalLM(config)

    def fit(self, network: LlamaForCausalLM, mixture: list[Tensor], steps: int, rate: float, seed: int) -> None:
        """AdamW with one cycle of the learning rate on random windows, as many of each text."""
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
        size = self.settings.window + 1
        network.train()
        for _ in range(steps):
            rows = (mixture[n % len(mixture)] for n in range(self.settings.batch))
            batch = torch.stack([random_window(row, size, generator) for row in rows])
            optimizer.zero_grad()
            loss(network, batch).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        network.eval()


def loss(network: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross entropy (nats) of the bytes [N, L] after the first of each window."""
    logits = network(input_ids=windows[:, :-1]).logits
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def random_window(text: Tensor, size: int, generator: torch.Generator) -> Tensor:
    start = int(torch.randint(len(text) - size + 1, (), generator=generator))
    return text[start : start + size].long()


def spread(text: Tensor, count: int, size: int) -> Tensor:
    """int64 [count, size]: windows at even distances from the first byte to the last."""
    starts = torch.linspace(0, len(text) - size, count, dtype=torch.float64).long()
    return text[starts[:, None] + torch.arange(size)].long()


def as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def save_text(found: Texts, file: Path) -> None:
    """What is scored and sampled lies beside the models: an upgrade of a package does not change it under them."""
    parts = ((task, part, text) for task, parts in found.items() for part, text in parts.items())
    save_file({f"{task}.{part}": as_tensor(text) for task, part, text in parts if part != "pretraining"}, file)


def read_text(folder: Path, task: str, part: str) -> Tensor:
    with safe_open(folder / TEXT, "pt") as file:
        return file.get_tensor(f"{task}.{part}")


def fingerprint(found: Texts) -> str:
    digest = hashlib.sha256()
    for parts in found.values():
        for text in parts.values():
            digest.update(hashlib.sha256(text).digest())
    return digest.hexdigest()


def is_marked(folder: Path, made_of: dict[str, object]) -> bool:
    mark = folder / MARK
    return mark.is_file() and json.loads(mark.read_text()) == made_of


def start_over(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
