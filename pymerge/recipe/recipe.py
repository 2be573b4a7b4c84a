"""The description of a merge, checked: models, steps, dtypes, exclusions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pymerge.errors import RecipeError
from pymerge.hub import commit_of
from pymerge.methods.base import Combine, MatrixCombine
from pymerge.methods.matrices import OfTaskVectors
from pymerge.recipe.keys import BESIDE_MODEL, LENIENT
from pymerge.recipe.layers import Layers
from pymerge.recipe.models import ModelRef
from pymerge.recipe.parts import plain_modules
from pymerge.recipe.problems import Problems
from pymerge.recipe.python_api import python_mapping
from pymerge.recipe.schema import Parsed, parse_recipe
from pymerge.recipe.steps import Steps
from pymerge.remote.mirror import is_remote

DTYPE_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, kw_only=True)
class Recipe(Parsed):
    """One merge. Built by `from_yaml`, `from_dict` or `from_kwargs`, which raise one RecipeError that lists every
    problem.

    base      the base model: what is subtracted (`subtract_base`), and whose side files and untouched tensors the
              output gets
    models    the T models that the methods see as tasks, in order; contains the base where a method averages or
              interpolates it
    listed    the models as the recipe lists them, the base included or not
    params    hyperparameters of the combine step for all models; a model's own are in its `params`
    align     permutations that put the models' units in one order first, or how they are found
    matrices  which tensors methods for matrices act on
    fused     matrices that are merged in parts or together
    vocabulary  tokens and rows of the merged model, where a recipe says other ones than the base's
    modules   of a recipe with slices or modules: its parts, each a recipe of its own. Then `models` are all models of
              all parts, each once; `base` gives side files, and is the base of parts that name none
    notes     what the recipe says without effect, for the summary
    """

    _steps: dict[Any, Steps] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str], *, models_must_exist: bool = True) -> Self:
        """A recipe from a YAML file, or from YAML text (text has more than one line or a colon and is not a file)."""
        from pymerge.recipe.yaml_text import parse_yaml, read_yaml

        is_text = isinstance(source, str) and ("\n" in source or (":" in source and not os.path.exists(source)))
        if is_text:
            return cls.from_dict(parse_yaml(str(source), "recipe"), models_must_exist=models_must_exist)
        path = Path(source)
        return cls.from_dict(read_yaml(path), source=str(path), models_must_exist=models_must_exist)

    @classmethod
    def from_dict(
        cls, raw: Any, *, source: str = "recipe", models_must_exist: bool = True, problems: Problems | None = None
    ) -> Self:
        """A recipe from the plain data of its YAML (mergekit's defaults unless `style` says otherwise). problems:
        decides what is one, and what a note."""
        return cls._of(parse_recipe(raw, source, python=False, must_exist=models_must_exist, problems=problems))

    @classmethod
    def from_kwargs(cls, base: Any, models: Sequence[Any], method: str, **options: Any) -> Self:
        """A recipe from Python arguments (the authors' defaults unless `style` says otherwise).

        base, models  paths, or models in memory: mappings from name to tensor, or modules. base None: the method needs
        none
        options       keys of a recipe (align, purify, calibrate, exclude, include, style, seed, strict, relax, dtype,
                      out_dtype, tokenizer_source, tokenizer, chat_template) and hyperparameters of the method; a list
                      for a per-model hyperparameter has one entry a model, and so have `fisher`, the Fisher information
                      (paths, or mappings from name to tensor), `statistics`, what `observe` found (paths, or
                      Statistics), and `data`, samples of the models' tasks (paths, {path, samples, length, field}, or
                      batches)
        """
        problems = Problems("merge")
        raw = python_mapping(base, models, method, options, problems)
        return cls._of(parse_recipe(raw, "merge", python=True, must_exist=True, problems=problems))

    @classmethod
    def _of(cls, parsed: Parsed) -> Self:
        fields: dict[str, Any] = dict(vars(parsed))
        fields["modules"] = tuple(module.of(cls._of) for module in parsed.modules)
        return cls(**fields)

    @cached_property
    def combine_class(self) -> type[Combine]:
        cls = self.templates[len(self.purify)].cls
        assert issubclass(cls, Combine)
        return cls

    @property
    def sequential(self) -> bool:
        """Whether a step asks for the inputs of layers behind those that were merged before."""
        return any(template.cls.sequential for template in self.templates)

    @property
    def subtract_base(self) -> bool:
        """Whether methods see task vectors (model minus base) and their result is added to the base."""
        return self.combine_class.subtracts(self.base is not None)

    @property
    def output_dtype(self) -> str | None:
        """Code of the output dtype (BF16, ...), None: as the base, or the first model, is stored."""
        name = self.out_dtype or self.dtype
        return DTYPE_CODES[name] if name else None

    @property
    def relaxations(self) -> dict[str, str]:
        """The checks that are relaxed, and how: those of `relax`, with strict false what mergekit does not check."""
        return (dict(LENIENT) if not self.strict else {}) | dict(self.relax)

    @property
    def resolved(self) -> dict[str, dict[str, str | None]]:
        """Where the models are that the recipe gives by other than their path or URL, and the commit of those in the
        Hub's cache."""
        given = [*([self.base] if self.base is not None else []), *self.listed]
        return {
            m.path: {"path": m.found, "commit": commit_of(m.found)}
            for m in given
            if m.found is not None and not any(map(is_remote, m.found.split("+")))
        }

    @property
    def other_rows(self) -> bool:
        """Whether embeddings and heads get other rows before they are merged: by their tokens, or those in common."""
        return self.vocabulary is not None or self.relaxations.get("vocabulary") == "truncate"

    def selects(self, name: str) -> bool:
        """Whether a tensor is merged; others are taken from the base (or the first model)."""
        included = not self.include or any(fnmatchcase(name, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    @cached_property
    def static(self) -> bool:
        """Whether all tensors have the same hyperparameters."""
        return all(template.static for template in self.templates)

    @property
    def needs_torch(self) -> bool:
        """Whether PyTorch computes some of it, as far as can be told without opening the models."""
        by_rule = all(template.cls.element_wise is True for template in self.templates)  # a property: as parameters say
        own = not by_rule or self.align is not None or bool(self.other_rows)
        return own or any(part.recipe.needs_torch for module in self.modules for part in module.parts)

    def steps_for(self, name: str, layer_t: float, own: Sequence[str] | None = None) -> Steps:
        """The steps of one tensor; one object for equal hyperparameters. layer_t: the tensor's `layer_positions`;
        own: its names in the models, where they differ."""
        if self.static and self._steps:
            return next(iter(self._steps.values()))  # the first is of a tensor, routed ones come later
        built: list[Any] = [template.at(name, layer_t, own) for template in self.templates]
        key = tuple(map(id, built))
        if key not in self._steps:
            at = len(self.purify)
            self._steps[key] = Steps(purify=tuple(built[:at]), combine=built[at], calibrate=tuple(built[at + 1 :]))
        return self._steps[key]

    def decomposes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether methods for matrices act on a tensor: a matrix, or matrices of experts. What goes into a file beside
        the weights is of whole tensors."""
        return self.matrices.has(name, shape) or (
            not self.combine_class.beside and self.matrices.has_stacked(name, shape)
        )

    def routed(self, steps: Steps, name: str, shape: tuple[int, ...]) -> Steps | None:
        """The steps that act on a tensor of this shape: tensors that are no weight matrices go past the steps for
        matrices, and get the mean (or what the recipe says) of their task vectors where the combine step is one. None:
        they stay at the base."""
        if not steps.spectral or self.decomposes(name, shape):
            return steps
        combine = steps.combine
        if isinstance(combine, MatrixCombine):
            how, scale = combine.rest_of(name)
            how = self.matrices.rest or how
            if how == "base":
                return None
            combine = OfTaskVectors(how=how, scale=scale)
        key = (id(steps), combine)
        if key not in self._steps:
            purify = tuple(step for step in steps.purify if not step.spectral)
            calibrate = tuple(step for step in steps.calibrate if not step.spectral)
            self._steps[key] = Steps(purify=purify, combine=combine, calibrate=calibrate)
        return self._steps[key]

    def resolve(self, names: Iterable[str], layers: Layers | None = None) -> dict[str, Steps]:
        """Name -> steps, for all selected names; one RecipeError for all names where a value is missing or wrong."""
        layers = layers or Layers.of(names)
        found: dict[str, Steps] = {}
        failed: dict[str, list[str]] = {}
        for name, t in layers.positions.items():
            if not self.selects(name):
                continue
            try:
                found[name] = self.steps_for(name, t, layers.own.get(name))
            except RecipeError as e:
                failed.setdefault(str(e).removeprefix(f"tensor {name}: "), []).append(name)
        problems = Problems(self.method)
        for text, where in failed.items():
            more = f" and {len(where) - 3} more" if len(where) > 3 else ""
            problems.add(", ".join(where[:3]) + more, text)
        problems.raise_if_any()
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back to an equal recipe; keys in a fixed order, empty ones left out."""
        out: dict[str, Any] = {}
        if self.base is not None:
            out["base_model"] = self.base.path
        if self.modules:
            out |= plain_modules(self.modules, _model_plain)
        out["models"] = [_model_plain(m) for m in self.listed]
        out["merge_method"] = self.method
        out["parameters"] = {name: setting.plain() for name, setting in self.params.items()}
        out["align"] = self.align.plain() if self.align is not None else None
        out["purify"] = [spec.plain() for spec in self.purify]
        out["calibrate"] = [spec.plain() for spec in self.calibrate]
        out |= {"exclude": list(self.exclude), "include": list(self.include), "style": self.style, "seed": self.seed}
        out |= {"spectral": self.matrices.plain(), "split": self.fused.plain_splits()}
        out |= {"join": [list(patterns) for patterns in self.fused.joins]}
        out |= {"strict": None if self.strict else False, "relax": dict(self.relax)}
        out |= {"dtype": self.dtype, "out_dtype": self.out_dtype}
        out |= self.vocabulary.plain() if self.vocabulary is not None else {}
        out |= {"chat_template": self.chat_template}
        return {key: value for key, value in out.items() if value not in (None, [], {})}

    def to_yaml(self) -> str:
        """The recipe as YAML."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)

    def digest(self) -> str:
        """Names this recipe in a journal: equal for equal recipes, 32 hexadecimal digits."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _model_plain(model: ModelRef) -> dict[str, Any]:
    params = {name: setting.plain() for name, setting in model.params.items()}
    beside = {key: ref.plain() for key in BESIDE_MODEL if (ref := getattr(model, key)) is not None}
    layers = {"layer_range": list(model.layers)} if model.layers is not None else {}
    return {"model": model.path} | layers | ({"parameters": params} if params else {}) | beside
