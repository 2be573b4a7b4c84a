"""What a merge method is: a frozen set of hyperparameters and one function on the tensors of one parameter.

Methods know nothing of files, devices, threads or YAML. The base class names the step that a method takes part in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pymerge.errors import RecipeError
from pymerge.ops.delta_rule import DeltaRule

if TYPE_CHECKING:
    from torch import Tensor

Style = Literal["authors", "mergekit"]
M = TypeVar("M", bound="type[Method]")
REGISTRY: dict[str, type[Method]] = {}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What may be known of a parameter before its entries are read."""

    name: str
    shape: tuple[int, ...]
    tasks: int
    seed: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class TaskGroup:
    """One parameter of all models.

    base   what is subtracted from each tuned tensor; None where the method has no base or where tuned are task vectors already
    tuned  T tensors as stored (any floating dtype; may differ), same shape
    """

    info: TensorInfo
    base: Tensor | None
    tuned: tuple[Tensor, ...]


def param(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    choices: tuple[Any, ...] | None = None,
    per_model: bool = False,
    mergekit: Any = MISSING,
    yaml: str | None = None,
) -> Any:
    """A hyperparameter: default (authors' style), documentation, range, and how YAML calls it.

    per_model  the field holds a tuple with one entry a task; the default is given for one task (None: required)
    mergekit   default under style "mergekit", where it differs
    yaml       name in YAML where it is not the field's name (`lambda` is always accepted for `scale`)
    """
    return field(
        default=None if per_model else default,
        metadata={
            "default": default,
            "doc": doc,
            "low": low,
            "high": high,
            "open_low": open_low,
            "choices": choices,
            "per_model": per_model,
            "mergekit": default if mergekit is MISSING else mergekit,
            "yaml": yaml,
        },
    )


class Method:
    """Common ground of all steps. `name` is the registered name, `step` one of purify | combine | calibrate."""

    name: ClassVar[str] = ""
    step: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()  # statistics that must exist before the merge starts, e.g. ("covariance",)
    element_wise: ClassVar[bool] = False


class Purify(Method):
    """One task's weight in, a cleaner task vector out."""

    step = "purify"

    def purify(self, group: TaskGroup) -> tuple[Tensor, ...]:
        """T task vectors, float32, of group's shape."""
        raise NotImplementedError


class Combine(Method):
    """T task tensors in, one merged update out."""

    step = "combine"
    base_role: ClassVar[Literal["required", "none", "first"]] = "required"  # "first": the base is the first of the models
    models: ClassVar[tuple[int, int | None]] = (1, None)  # fewest and most fine-tuned models

    def combine(self, group: TaskGroup) -> Tensor:
        """Merged update, float32: what is added to the base, or the merged weight where base_role is not "required"."""
        raise NotImplementedError


class Calibrate(Method):
    """Merged update and the task tensors in, corrected update out."""

    step = "calibrate"

    def calibrate(self, update: Tensor, group: TaskGroup) -> Tensor:
        """Corrected update, float32, of update's shape."""
        raise NotImplementedError


class ElementWiseCombine(Combine):
    """A combine step that is a `DeltaRule`: runs on torch tensors and, streamed, on byte buffers without torch."""

    element_wise = True

    def rule(self, info: TensorInfo) -> DeltaRule:
        raise NotImplementedError

    def combine(self, group: TaskGroup) -> Tensor:
        from pymerge.ops.delta import merge_by_rule

        return merge_by_rule(self.rule(group.info), group.base, group.tuned)


class ElementWisePurify(Purify):
    """A purify step that only selects and rescales entries: it edits the combine step's rule."""

    element_wise = True

    def amend(self, rule: DeltaRule, info: TensorInfo) -> DeltaRule:
        """`rule` with this step's selection added in front of it."""
        raise NotImplementedError
