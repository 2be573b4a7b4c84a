"""The models, files and variables that code blocks speak of: made when a block names them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.adapters import random_factors, write_adapter
from tests.components import random_model, tuned_model, write_pipeline
from tests.models import read_model, tuned_from, write_model
from tests.vocabulary.small import TEXTS, byte_level

TARGETS = ("q_proj", "v_proj", "down_proj")
SEEDS = {"base": 0, "math": 1, "code": 2, "chat": 3}


def small_tokenizer() -> Any:
    tokenizer = byte_level("plain", 280, added=["<|im_end|>", "<pad>", "<tool>"])
    tokenizer.pad_token, tokenizer.padding_side = "<pad>", "left"
    return tokenizer


def llama(folder: Path, seed: int, **sizes: Any) -> dict[str, Tensor]:
    """A Llama with random weights, and the tokenizer that all have."""
    import transformers

    torch.manual_seed(seed)
    tokenizer = small_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=tokenizer.pad_token_id,
        **{"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2} | sizes,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return read_model(folder)


class World:
    """A folder in which blocks run; `need` makes what a block names and the folder lacks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def names(self) -> Mapping[str, Callable[[Path], object]]:
        """How each folder and file is made, by its name."""
        made: dict[str, Callable[[Path], object]] = dict.fromkeys(SEEDS, self._tuned)
        for task in ("math", "code", "chat"):
            made |= {
                f"{task}-lora": self._adapter,
                f"{task}.jsonl": self._texts,
                f"{task}.stats.safetensors": self._statistics,
                f"{task}.fisher.safetensors": self._fisher,
            }
        for seed, name in enumerate("ab"):
            made[name] = lambda path, seed=seed: llama(path, seed, num_hidden_layers=32, hidden_size=16)
        for seed, name in enumerate(("stable-diffusion", "anime", "photo")):
            made[name] = lambda path, seed=seed: self._pipeline(path, seed)
        return made | {"samples.jsonl": self._texts, "recipe.yaml": self._recipe}

    def need(self, text: str) -> None:
        """Make what this text names, by whole words."""
        names = self.names
        for name in re.findall(r"(?<![\w-])(?:\./)?([a-z][\w.-]*\w|[ab])", text):
            self.make(name) if name in names else None

    def make(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            self.names[name](path)
        return path

    def variable(self, name: str) -> Any:
        """What a block may use without having made it: models in memory, a tokenizer, batches. KeyError: nothing."""
        if name in SEEDS:
            return read_model(self.make(name))
        if name == "model":
            import transformers

            return transformers.AutoModelForCausalLM.from_pretrained(self.make("math"))
        return {"tokenizer": small_tokenizer, "prompts": lambda: TEXTS["plain"][:2], "batches": _batches}[name]()

    def _tuned(self, path: Path) -> None:
        """The base, or a child of it that differs in every tensor."""
        seed = SEEDS[path.name]
        tensors = llama(path, 0, num_hidden_layers=2)
        if seed:
            config = json.loads((path / "config.json").read_text())
            write_model(path, tuned_from(tensors, seed, scale=0.02), config)

    def _adapter(self, path: Path) -> None:
        base = read_model(self.make("base"))
        shapes = {n: tuple(t.shape) for n, t in base.items() if any(target in n for target in TARGETS)}
        seed = SEEDS[path.name.removesuffix("-lora")]
        write_adapter(path, random_factors(seed, shapes), base="base", target_modules=TARGETS)

    def _texts(self, path: Path) -> None:
        texts = TEXTS["code" if path.name.startswith("code") else "plain"] * 4
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def _statistics(self, path: Path) -> None:
        import pymerge
        from pymerge.statistics.samples import batches_of

        task = path.name.partition(".")[0]
        model, data = self.make(task), self.make(f"{task}.jsonl")
        pymerge.observe(model, batches_of(model, data, samples=16, length=32, batch_size=8)).save(path)

    def _fisher(self, path: Path) -> None:
        tensors = read_model(self.make(path.name.partition(".")[0]))
        save_file({name: tensor.square() for name, tensor in tensors.items()}, path)

    def _recipe(self, path: Path) -> None:
        models = [{"model": str(self.make(name)), "parameters": {"weight": 0.5}} for name in ("math", "code")]
        path.write_text(json.dumps({"merge_method": "ties", "base_model": str(self.make("base")), "models": models}))

    def _pipeline(self, path: Path, seed: int) -> None:
        base = random_model(0)
        write_pipeline(path, tuned_model(base, seed) if seed else base)


def _batches() -> list[dict[str, Tensor]]:
    encoded = small_tokenizer()(TEXTS["plain"][:4], return_tensors="pt", padding=True)
    return [{key: encoded[key] for key in ("input_ids", "attention_mask")}]
