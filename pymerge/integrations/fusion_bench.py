"""pymerge's methods as a FusionBench algorithm: `fusion_bench method=pymerge/tsv_m ...`.

The configs are in fusion_bench_conf/method/pymerge; hydra_plugins/pymerge_configs.py puts them in hydra's search path.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import copy
import inspect
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from fusion_bench.dataset.image_dataset import ImageClassificationDataset
from fusion_bench.method import BaseAlgorithm
from fusion_bench.mixins import LightningFabricMixin, auto_register_config
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.models.utils import get_target_state_dict, validate_target_modules_equal
from fusion_bench.utils.lazy_state_dict import LazyStateDict
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from pymerge.engine.api import Recipe, merge
from pymerge.engine.plan import Options
from pymerge.errors import InputError, RecipeError
from pymerge.methods import describe, get
from pymerge.statistics import Statistics, observe

log = logging.getLogger(__name__)
LABELS = ("label", "labels")


@auto_register_config
class PymergeAlgorithm(LightningFabricMixin, BaseAlgorithm):
    """Any of pymerge's methods on a model pool.

    merge_method  a combine method: pymerge.methods.list("combine")
    exclude_keys  name patterns of tensors that stay as they are in the base
    samples, batch_size, dataset  what models are run on where a method needs to know the inputs of their layers: so
                  many samples, at equal distances, of each task's `train`, `val` or `test` dataset in the pool
    parameters    the other arguments of pymerge.merge: hyperparameters (one value, or a list with one a model),
                  `purify`, `calibrate`, `seed`, `statistics`, ...; None: not given
    """

    def __init__(
        self,
        merge_method: str,
        exclude_keys: Sequence[str] | None = None,
        samples: int = 32,
        batch_size: int = 8,
        dataset: str = "train",
        **parameters: Any,
    ) -> None:
        of_base = {key: parameters.pop(key) for key in ("_recursive_", "_usage_", "_version_") if key in parameters}
        super().__init__(**of_base)
        self.exclude_keys = list(exclude_keys or ())
        self.parameters = {name: plain(value) for name, value in parameters.items() if value is not None}

    @property
    def config(self) -> DictConfig:
        return OmegaConf.create({**super().config, **self.parameters}, flags={"allow_objects": True})

    def run(self, modelpool: BaseModelPool | Mapping[str, nn.Module] | Sequence[nn.Module]) -> nn.Module:
        """A new module: the pool's `_pretrained_` model (the first model, where the method has no base) with merged
        weights. The pool's models are not touched; submodules that a model's `_fusion_bench_target_modules` leaves out
        are not merged. Pools that load lazily are merged from disk to disk, in a temporary folder."""
        pool: Any = modelpool if isinstance(modelpool, BaseModelPool) else BaseModelPool(modelpool)
        base = self.load_base(pool)
        models = [model for _, model in pool.named_models()]
        if not models:
            raise InputError(f"the pool has no models to merge, only {pool.all_model_names}")
        first: Any = base if base is not None else models[0]
        validate_target_modules_equal([first, *models])
        exclude = [*self.exclude_keys, *self.parameters.get("exclude", ())]
        arguments: dict[str, Any] = {**self.parameters, "method": self.merge_method, "exclude": exclude}
        arguments |= {"base": None if base is None else source_of(base), "models": [source_of(m) for m in models]}
        if self.needs_statistics() and not arguments.keys() & {"statistics", "data"}:
            named = dict(zip(pool.model_names, models, strict=True))
            if isinstance(first, LazyStateDict):  # observed layer by layer while they are merged
                arguments["data"] = [next(self.batches(pool, name, m, self.samples), None) for name, m in named.items()]
            else:
                Recipe.from_kwargs(**arguments, statistics=[{} for _ in models])  # wrong options, before models are run
                arguments["statistics"] = self.observe(pool, named)
        arguments["options"] = Options(device=str(self.fabric.device))
        log.info(f"pymerge: {self.merge_method} of {', '.join(pool.model_names)} on {self.fabric.device}")
        if isinstance(first, LazyStateDict):
            if first.meta_module_class is None:
                raise InputError(f"{first.checkpoint}: loaded lazily by a pool that does not say its class")
            with tempfile.TemporaryDirectory(prefix="pymerge-") as folder:
                merge(**arguments, out=f"{folder}/merged")
                return first.meta_module_class.from_pretrained(f"{folder}/merged", torch_dtype=first._torch_dtype)
        merged = merge(**arguments)
        result = copy.deepcopy(first) if pool.has_instance_models else first
        if extra := result.load_state_dict(merged, strict=False).unexpected_keys:
            raise InputError(f"the merged tensors do not fit the module: extra {extra}")
        return result

    def load_base(self, pool: BaseModelPool) -> nn.Module | LazyStateDict | None:
        """The pool's base, where the method has one."""
        if what := getattr(get(self.merge_method), "beside", ""):
            raise RecipeError(f"{self.merge_method} leaves {what} beside the merged model: merge folders with pymerge")
        if "adapters" in get(self.merge_method).needs:
            raise RecipeError(f"{self.merge_method} merges LoRA adapters, a pool has models: merge their folders")
        role = describe(self.merge_method).base
        if role == "required" and not pool.has_pretrained:
            raise InputError(
                f"{self.merge_method} needs a base: the pool's models are {pool.model_names}, add `_pretrained_`"
            )
        return pool.load_pretrained_model() if role in ("required", "optional") and pool.has_pretrained else None

    def needs_statistics(self) -> bool:
        """Whether a step needs what layers see."""
        steps: list[Any] = [self.merge_method]
        for given in (self.parameters.get("purify"), self.parameters.get("calibrate")):
            steps += given if isinstance(given, list | tuple) else [given] if given else []
        names = [step.get("method", "") if isinstance(step, Mapping) else step for step in steps]
        return any("covariance" in describe(name).needs for name in names)

    def observe(self, pool: BaseModelPool, models: Mapping[str, nn.Module]) -> list[Statistics]:
        """What the layers of each model see of its task's dataset, on Fabric's device."""
        batches = {name: self.batches(pool, name, model, self.batch_size) for name, model in models.items()}
        found = []
        for name, model in models.items():
            log.info(f"pymerge: observing {name} on {self.samples} samples")
            targets = getattr(model, "_fusion_bench_target_modules", None) or ()
            patterns = [pattern for target in targets for pattern in (target, f"{target}.*")]
            home = next(model.parameters()).device
            try:
                found.append(observe(model.to(self.fabric.device), batches[name], targets=patterns))
            finally:
                model.to(home)
        return found

    def batches(self, pool: BaseModelPool, name: str, model: Any, size: int) -> Iterator[Any]:
        """What the model is called with, `size` samples at once. Override it for datasets of another kind.

        Samples are mappings, of which the model gets what it takes by name but no labels, or tuples, of which it gets
        the first; in pools with an image processor that prepares the images. Texts of unequal lengths are padded."""
        module = model.meta_module if isinstance(model, LazyStateDict) else model
        takes = set(inspect.signature(module.forward).parameters) - set(LABELS)
        items = (inputs_of(item, takes, name) for item in spread(self.load_dataset(pool, name), self.samples))
        return (self.fabric.to_device(collated(batch)) for batch in iter(lambda: list(islice(items, size)), []))

    def load_dataset(self, pool: BaseModelPool, name: str) -> Any:
        """The dataset of a task, with its images prepared."""
        kinds = ("train", "val", "test")
        if self.dataset not in kinds:
            raise RecipeError(f"dataset: must be one of {', '.join(kinds)}, got {self.dataset!r}")
        known = getattr(pool, f"{self.dataset}_dataset_names")
        if name not in known:
            raise InputError(
                f"a dataset is needed for each task: the pool has {self.dataset} datasets {known}, none for {name}. "
                f"Add it, choose method.dataset={'|'.join(kinds)}, or give statistics=[...]"
            )
        dataset = getattr(pool, f"load_{self.dataset}_dataset")(name)
        if hasattr(pool, "load_processor"):
            return ImageClassificationDataset(dataset, pool.load_processor())
        return dataset


def source_of(model: Any) -> Mapping[str, Tensor] | str:
    """What pymerge.merge takes of a model: its tensors, or the folder that it would be loaded from."""
    return model._local_path if isinstance(model, LazyStateDict) else get_target_state_dict(model)


def plain(value: Any) -> Any:
    """Lists and mappings of a config as Python's own."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def spread(dataset: Any, count: int) -> Iterator[Any]:
    """`count` samples at equal distances: datasets may be sorted by label. Of a stream, the first."""
    if not hasattr(dataset, "__len__"):
        return islice(iter(dataset), count)
    count = min(count, len(dataset))
    return (dataset[i * len(dataset) // count] for i in range(count))


def inputs_of(item: Any, takes: set[str], task: str) -> Tensor | dict[str, Tensor]:
    """What the model takes of one sample."""
    if isinstance(item, Mapping):
        found = {key: torch.as_tensor(value) for key, value in item.items() if key in takes}
        if not found:
            raise InputError(f"samples of {task} have {', '.join(item)}; the model takes {', '.join(sorted(takes))}")
        if "input_ids" in found and "attention_mask" in takes:
            found.setdefault("attention_mask", torch.ones_like(found["input_ids"]))
        return found
    value = item[0] if isinstance(item, tuple | list) else item
    if not isinstance(value, Tensor):
        raise InputError(f"samples of {task} hold {type(value).__name__}: tensors, or mappings by name, are needed")
    return value


def collated(items: Sequence[Any]) -> Tensor | dict[str, Tensor]:
    """One batch; rows of unequal length are filled up with zeros, which the attention mask then marks."""
    if isinstance(items[0], dict):
        return {
            key: nn.utils.rnn.pad_sequence([item[key] for item in items], batch_first=True)
            if items[0][key].dim() == 1
            else torch.stack([item[key] for item in items])
            for key in items[0]
        }
    return torch.stack(list(items))
