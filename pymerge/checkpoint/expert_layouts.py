"""Mixtures of experts: one tensor for all experts of a layer, or one for each expert; and the names of both.

    fused       experts.gate_up_proj [E, 2 f, h] (gate above up), experts.down_proj [E, h, f]: transformers 5 in memory
    turned      the same as [E, h, 2 f] and [E, f, h]: Llama 4, Qwen3-VL-MoE
    per expert  experts.N.gate_proj.weight [f, h], up_proj, down_proj; w1, w3, w2 in Mixtral and its relatives

Names that go with it (block_sparse_moe, mlp) are understood too. gpt-oss has no layout per expert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pymerge.checkpoint.header import name_list, safe_name
from pymerge.checkpoint.read import AnyTensor, Checkpoint
from pymerge.checkpoint.stacked import PartTensor, StackedTensor, TurnedTensor
from pymerge.errors import InputError, MergeError, MissingTensor, ShapeMismatch

FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
# One spelling for all: (pattern, replacement) on whole names, in this order.
SPELLINGS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\.block_sparse_moe\.input_linear\.weight$", ".mlp.experts.gate_up_proj"),
        (r"\.block_sparse_moe\.output_linear\.weight$", ".mlp.experts.down_proj"),
        (r"\.block_sparse_moe\.router\.layer\.", ".mlp.gate."),
        (r"\.block_sparse_moe\.", ".mlp."),
        (r"\.mlp\.router\.weight$", ".mlp.gate.weight"),
        (r"(\.experts\.\d+)\.(?:w1|fc1)\.", r"\1.gate_proj."),
        (r"(\.experts\.\d+)\.(?:w3|fc3)\.", r"\1.up_proj."),
        (r"(\.experts\.\d+)\.(?:w2|fc2)\.", r"\1.down_proj."),
    )
)
_FUSED = re.compile(r"(?P<prefix>.*\.experts)\.(?P<what>gate_up_proj|up_proj|down_proj)")
_SINGLE = re.compile(r"(?P<prefix>.*\.experts)\.(?P<number>\d+)\.(?P<what>gate_proj|up_proj|down_proj)\.weight")


def spelt(name: str) -> str:
    """The name as transformers 5 has it."""
    for pattern, replacement in SPELLINGS:
        name = pattern.sub(replacement, name)
    return name


@dataclass
class Mapper:
    """A model's tensors under the names and in the shapes of the reference."""

    reference: Checkpoint
    model: Checkpoint
    label: str
    problems: dict[str, tuple[type[MergeError], str]] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)  # names of the reference that are made of others
    used: set[str] = field(default_factory=set)  # names of the model that others are made of

    def __post_init__(self) -> None:
        self.own = {spelt(name): name for name in self.model}
        self.wanted = {spelt(name): name for name in self.reference}
        self.counts = expert_counts(self.own), expert_counts(self.wanted)

    def run(self) -> Checkpoint:
        """The model in the reference's layout; itself where that is its own already."""
        found: dict[str, AnyTensor] = {}
        for known, name in self.wanted.items():
            tensor = self.find(name, known)
            if tensor is not None:
                found[name] = tensor
        if self.problems or not self.made:
            return self.model
        rest = {name: self.model[name] for name in self.model.file_order() if name not in self.used}
        tensors = {name: found.get(name, rest.get(name)) for name in (*self.reference, *rest)}
        text = f"read in the layout of experts that the reference has: {len(self.made)} tensor(s): "
        return self.model.viewed(
            {name: tensor for name, tensor in tensors.items() if tensor is not None},
            notes=[text + name_list(self.made, 4)],
        )

    def find(self, name: str, known: str) -> AnyTensor | None:
        """The tensor of the model, where it is not simply the one of that name."""
        fused, single = _FUSED.fullmatch(known), _SINGLE.fullmatch(known)
        tensor: AnyTensor | None = None
        if known in self.own:
            turns = fused is not None and self.turns(fused["prefix"])
            if self.own[known] == name and not turns:
                return None
            self.used.add(self.own[known])
            tensor = self.model[self.own[known]]
            tensor = TurnedTensor(tensor) if turns else tensor
        elif fused:
            tensor = self.stacked(name, fused["prefix"], fused["what"])
        elif single:
            tensor = self.part(name, single["prefix"], int(single["number"]), single["what"])
        if tensor is not None:
            self.made.append(name)
        return tensor

    def turns(self, prefix: str) -> bool:
        """Whether model and reference have fused experts the one the other way round than the other."""
        return is_turned(self.model, self.own, prefix) != is_turned(self.reference, self.wanted, prefix)

    def stacked(self, name: str, prefix: str, what: str) -> AnyTensor | None:
        """A tensor of all experts, made of those of each."""
        count = self.counts[0].get(prefix, 0)
        if not count:
            return None
        names = [f"{prefix}.{i}.{part}.weight" for i in range(count) for part in FUSED[what]]
        absent = [known for known in names if known not in self.own]
        if absent:
            self.refuse(MissingTensor, name, f"lacks {name_list(absent)} of {count} experts. Download it again")
            return None
        parts = [self.model[self.own[known]] for known in names]
        self.used.update(self.own[known] for known in names)
        dtypes, shapes = sorted({part.dtype for part in parts}), sorted({tuple(part.shape) for part in parts})
        if len(dtypes) > 1 or len(shapes) > 1 or len(shapes[0]) != 2:
            text = f"has experts of {dtypes} {[list(shape) for shape in shapes]}. One dtype and one shape are needed"
            self.refuse(ShapeMismatch, name, text)
            return None
        m, n = shapes[0]
        stacked = StackedTensor(name, parts, (count, m * len(FUSED[what]), n))
        return TurnedTensor(stacked) if is_turned(self.reference, self.wanted, prefix) else stacked

    def part(self, name: str, prefix: str, number: int, what: str) -> AnyTensor | None:
        """One expert's matrix, cut from the tensor of all."""
        whole = next((w for w in ("gate_up_proj", what) if what in FUSED[w] and f"{prefix}.{w}" in self.own), None)
        if whole is None:
            return None
        held = self.own[f"{prefix}.{whole}"]
        source, shape = self.model[held], self.reference[name].shape
        self.used.add(held)
        if (bias := f"{held}_bias") in self.model:
            text = "which interleaves gate and up as gpt-oss does and has no layout for each expert"
            self.refuse(InputError, held, f"has {safe_name(bias)}, {text}. Merge models of one layout")
            return None
        if is_turned(self.model, self.own, prefix):
            source = TurnedTensor(source)
        parts = FUSED[whole]
        experts = self.counts[1][prefix]
        if len(shape) != 2 or source.shape != (experts, len(parts) * shape[0], shape[1]):
            text = f"has {list(self.model[held].shape)}, the base {experts} experts with {what} {list(shape)}"
            self.refuse(ShapeMismatch, held, f"{text}. Merge models fine-tuned from one base")
            return None
        first = (number * len(parts) + parts.index(what)) * shape[0] * shape[1]
        return PartTensor(name, source, first, shape)

    def refuse(self, kind: type[MergeError], name: str, text: str) -> None:
        """Notes one problem a tensor."""
        self.problems.setdefault(name, (kind, f"{safe_name(name)}: {self.label} {text}."))


def is_turned(model: Checkpoint, names: Mapping[str, str], prefix: str) -> bool:
    """Whether fused experts are [E, h, 2 f] and [E, f, h]. names: as transformers 5 has them -> the model's."""
    up, down = names.get(f"{prefix}.gate_up_proj"), names.get(f"{prefix}.down_proj")
    if up is None or down is None or len(model[up].shape) != 3 or len(model[down].shape) != 3:
        return False
    (_, a, b), (_, c, d) = model[up].shape, model[down].shape
    return (a, b) == (d, 2 * c)


def expert_counts(names: Mapping[str, str]) -> dict[str, int]:
    """Experts -> how many have tensors of their own, the highest number counting."""
    counts: dict[str, int] = {}
    for name in names:
        if found := _SINGLE.fullmatch(name):
            counts[found["prefix"]] = max(counts.get(found["prefix"], 0), int(found["number"]) + 1)
    return counts
