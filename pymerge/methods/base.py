"""What a merge method is: a frozen set of hyperparameters and one function on the tensors of one parameter.

Methods know nothing of files, devices, threads or YAML. The base class names the step that a method takes part in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, NoReturn, Protocol

from pymerge.errors import RecipeError
from pymerge.methods.param import REQUIRED, STYLES, UNUSED, Auto, Param, Style, complete, param, params_of
from pymerge.methods.registry import REGISTRY, register
from pymerge.methods.work import Work, passes, truncated
from pymerge.ops.delta_rule import DeltaRule

if TYPE_CHECKING:
    from torch import Tensor, dtype

__all__ = [
    "REGISTRY",
    "REQUIRED",
    "STYLES",
    "UNUSED",
    "AdapterCombine",
    "Auto",
    "Calibrate",
    "Combine",
    "ElementWiseCombine",
    "ElementWisePurify",
    "Factors",
    "LayerInput",
    "MatrixCombine",
    "Method",
    "Notes",
    "Param",
    "PerModel",
    "Purify",
    "Style",
    "TaskGroup",
    "TensorInfo",
    "chain_rule",
    "merges_by_rule",
    "param",
    "register",
]

PerModel = float | tuple[float, ...]  # one value for all tasks, or one a task


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What may be known of a parameter before its entries are read. A whole model: name "", shape (entries,).

    depth  place of the tensor's layer in its stack, index / (layers - 1); None outside of all layers
    """

    name: str
    shape: tuple[int, ...]
    tasks: int
    seed: int = 0
    depth: float | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass
class Notes:
    """What the steps of one tensor tell the summary and each other.

    facts    numbers and short words for merge.json ("gamma": 0.2, "branch": "homogeneous"); lists of numbers are fine
    combine  name of the combine step
    basis    set by a combine step whose update has equal singular values: gives the singular directions that it was
             built from, U [m, k] and V [n, k], so that a calibrate step need not recompute what is not defined
    """

    facts: dict[str, Any] = field(default_factory=dict)
    combine: str = ""
    basis: Callable[[], tuple[Tensor, Tensor]] | None = None


class LayerInput(Protocol):
    """What one model's linear layer was given over some samples. Everything is read when it is asked for, and anew each
    time: ask once."""

    @property
    def rows(self) -> int:
        """N, padding not counted."""
        ...

    @property
    def mean(self) -> Tensor:
        """float32 [n]."""
        ...

    @property
    def samples(self) -> Tensor | None:
        """X [N, n] where the rows themselves are kept (N <= 9 n / 16)."""
        ...

    @property
    def triangle(self) -> Tensor | None:
        """The upper triangle of X^T X, row by row [n (n + 1) / 2], on the CPU, where they are not."""
        ...

    def second_moment(self, dtype: dtype) -> Tensor:
        """X^T X [n, n], a new tensor, not divided by N; from `samples` where there are some."""
        ...


class Factors(NamedTuple):
    """left [m, r] times right [r, n]: an update of rank r, never multiplied out. float32; an adapter's scale is in
    left. r = 0: no update."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True, kw_only=True)
class TaskGroup:
    """One parameter of all models, or some of its rows.

    base   what is subtracted from each tuned tensor; None where the method has no base or where tuned are task
           vectors already
    tuned  T tensors as stored (any floating dtype; may differ), same shape
    first  index of the first entry within the parameter (info.shape is the whole parameter's)
    weights  T tensors of importances beside the tuned ones (Fisher information); None: the merge has none
    inputs   T inputs of the layer whose weight matrix [m, n] this is; None: there are no statistics of it
    transposed  the matrices are [n, m], as Conv1D stores them; steps that need `inputs` are given them as [m, n]
    factors  the T task vectors of adapters, then base is None and tuned is empty; None: they are not factored
    """

    info: TensorInfo
    base: Tensor | None
    tuned: tuple[Tensor, ...]
    first: int = 0
    weights: tuple[Tensor, ...] | None = None
    inputs: tuple[LayerInput, ...] | None = None
    transposed: bool = False
    factors: tuple[Factors, ...] | None = None
    notes: Notes = field(default_factory=Notes, compare=False)

    def delta(self, task: int) -> Tensor:
        """The task vector of one task, float32, a new tensor."""
        tuned = self.tuned[task]
        return tuned.float() - self.base.float() if self.base is not None else tuned.float().clone()


class Method:
    """Common ground of all steps. `name` is the registered name, `step` one of purify | combine | calibrate.

    Subclasses are frozen keyword-only dataclasses whose fields are made by `param`. Building one fills in the
    defaults of its style and checks every range; RecipeError names each field, its value and its range.
    """

    name: ClassVar[str] = ""
    step: ClassVar[str] = ""
    package: ClassVar[str] = ""  # name and version of the package that brings it; "": pymerge itself
    paper: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()  # statistics that must exist before the merge starts, e.g. ("covariance",)
    # The inputs of a layer are those behind the layers merged before it: models are observed while they are merged.
    sequential: ClassVar[bool] = False
    ignored: ClassVar[Mapping[str, str]] = {}  # names that mergekit accepts without effect here, with the reason
    element_wise: ClassVar[bool] = False
    spectral: ClassVar[bool] = False  # acts on weight matrices only; other tensors go past it
    # What a step that is no DeltaRule must see at once: the tensor, whole rows (slices of the first dimension; a tensor
    # with fewer than two dimensions is one row), or any range of entries.
    unit: ClassVar[Literal["tensor", "rows", "entries"]] = "tensor"

    def __post_init__(self) -> None:
        known = params_of(type(self))
        values, problems = complete(known, {name: getattr(self, name) for name in known})
        for name, value in values.items():
            object.__setattr__(self, name, value)
        problems = problems or self.conflicts()
        if problems:
            raise RecipeError("\n".join(f"{self.name}: {p}" for p in problems))

    @property
    def on_cores(self) -> bool:
        """Whether rotations of a matrix's rows and columns rotate the result likewise, at least those that keep
        (1, ..., 1) up to its length. Then adapters' task vectors are given as small cores (`methods.cores`);
        group.info.shape stays that of the matrix."""
        return False

    def conflicts(self) -> list[str]:
        """Problems between hyperparameters that are each within their range."""
        return []

    def workspace(self, info: TensorInfo) -> int:
        """Bytes that the step takes beside its inputs and its result, for a tensor (or a part of one) of info's shape.

        The default: the task vectors and two more tensors in float32."""
        return 0 if self.element_wise else 4 * info.numel * (info.tasks + 2)

    def work(self, info: TensorInfo) -> Work:
        """What the step computes on a tensor of info's shape, for estimates of time.

        The default: a few passes over the task vectors; of steps for matrices a decomposition of each."""
        if not self.spectral or len(info.shape) != 2:
            return passes(info.numel, 0 if self.element_wise else 8 * info.tasks)
        return (truncated(*info.shape, min(info.shape)) + passes(info.numel, 8)).times(info.tasks)


class Purify(Method):
    """One task's weight in, a cleaner task vector out."""

    step = "purify"
    whole_weights: ClassVar[bool] = False  # needs the models' weights, not task vectors: must be the first such step

    def purify(self, group: TaskGroup) -> tuple[Tensor, ...]:
        """T task vectors, float32, of group's shape."""
        raise NotImplementedError


class Combine(Method):
    """T task tensors in, one merged update out.

    A field called `scale` multiplies the update, last of all and in float32: an update at scale 1 serves every scale.
    """

    step = "combine"
    # "first": the base is the first of the models; "optional": with a base the method merges task vectors, without one
    # whole weights; "none": a base is a model like any other
    base_role: ClassVar[Literal["required", "optional", "none", "first"]] = "required"
    models: ClassVar[tuple[int, int | None]] = (1, None)  # fewest and most fine-tuned models
    beside: ClassVar[str] = ""  # what it leaves in a file of its own beside the merged weights (engine/beside.py)

    @classmethod
    def subtracts(cls, has_base: bool) -> bool:
        """Whether the method sees task vectors, in a merge with or without a base."""
        return cls.base_role == "required" or (cls.base_role == "optional" and has_base)

    def combine(self, group: TaskGroup) -> Tensor:
        """Merged update, float32: what is added to the base, or the merged weight where none is subtracted."""
        raise NotImplementedError

    def factor_of(self, name: str, observed: bool) -> float:
        """What `scale` multiplies the update of this tensor by. observed: there are statistics of its layer."""
        return getattr(self, "scale", 1.0)


class MatrixCombine(Combine):
    """A combine step for the weight matrices [out, in] of linear layers (`methods.matrices` says which tensors are).

    All other tensors get the mean of the task vectors times `scale` where the method has that field, the sum, or stay
    at the base, by the recipe's `spectral: {rest: ...}` or by `rest_of`.
    """

    spectral = True

    @property
    def rest(self) -> Literal["mean", "sum", "base"]:
        return "mean"

    def rest_of(self, name: str) -> tuple[Literal["mean", "sum", "base"], float]:
        """What the tensor of this name, no weight matrix, gets; and times what."""
        return self.rest, getattr(self, "scale", 1.0)


class AdapterCombine(MatrixCombine):
    """A combine step that is defined by the factors of LoRA adapters: all models must be adapters."""

    needs = ("adapters",)

    def combine_factors(self, group: TaskGroup) -> Factors:
        """The merged update before `scale`, from group.factors, oriented [out, in]."""
        raise NotImplementedError

    def factor_workspace(self, info: TensorInfo, rank: int) -> int:
        """Bytes beside factors and update, for adapters whose ranks sum to `rank`."""
        return 0

    def combine(self, group: TaskGroup) -> NoReturn:
        raise RecipeError(f"{self.name}: {group.info.name}: merges LoRA adapters, found whole matrices")


class Calibrate(Method):
    """Merged update and the task tensors in, corrected update out."""

    step = "calibrate"

    def calibrate(self, update: Tensor, group: TaskGroup) -> Tensor:
        """Corrected update, float32, of update's shape."""
        raise NotImplementedError


class ElementWiseCombine(Combine):
    """A combine step that is a `DeltaRule`: runs on torch tensors and, streamed, on byte buffers without torch."""

    element_wise = True
    takes_selection: ClassVar[bool] = True  # whether element-wise purify steps may edit the rule

    @property
    def survey_scope(self) -> Literal["tensor", "model"]:
        """Over what magnitudes are ranked and signs counted.

        "model": `rule` is asked once with the info of the concatenated model and resolved with a survey of the whole
        model; a tensor's own rule gives only its random mask (`keep`, `keys`), in the survey and in the merge.
        """
        return "tensor"

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

    def purify(self, group: TaskGroup) -> tuple[Tensor, ...]:
        from pymerge.ops.delta import merge_by_rule

        return tuple(
            merge_by_rule(_only(t, group.info.tasks, self, group.info), group.base, group.tuned)
            for t in range(group.info.tasks)
        )


def _only(task: int, tasks: int, step: ElementWisePurify, info: TensorInfo) -> DeltaRule:
    """The rule whose sum is one purified task vector: the other tasks weigh nothing."""
    return step.amend(DeltaRule(weights=tuple(float(t == task) for t in range(tasks))), info)


def merges_by_rule(purify: Sequence[Purify], combine: Combine) -> bool:
    """Whether one `DeltaRule` does all these steps: `chain_rule` gives it."""
    if not (isinstance(combine, ElementWiseCombine) and combine.element_wise):
        return False
    return not purify or (combine.takes_selection and all(step.element_wise for step in purify))


def chain_rule(purify: Sequence[Purify], combine: ElementWiseCombine, info: TensorInfo) -> DeltaRule:
    """The one rule that does all element-wise steps of a recipe at once, purify steps in order, then combine."""
    rule = combine.rule(info)
    for step in reversed(purify):
        if not isinstance(step, ElementWisePurify):
            raise TypeError(f"{step.name} is not an element-wise step")
        rule = step.amend(rule, info)
    return rule


def per_task(value: Any, tasks: int, name: str = "value") -> tuple[float, ...]:
    """One entry a task from a per-model hyperparameter."""
    if not isinstance(value, tuple):
        return (value,) * tasks
    if len(value) != tasks:
        raise RecipeError(f"{name}: {len(value)} values for {tasks} models: give one value or one a model")
    return value
