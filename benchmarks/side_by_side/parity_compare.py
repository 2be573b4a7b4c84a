"""What two programs made of one YAML: tensors, config.json, tokenizer files, index.

Tensors: the largest difference of two entries, relative to the largest entry of the tensor, is at most ROUNDING of the
stored type. Random methods: share of changed entries and L1 norm of the change (agreement.py). Where a selection cuts
through a run of equal magnitudes, the entries of the run are excepted and counted: mergekit's sort is not stable. Rows
of a union of vocabularies are compared by token: mergekit appends tokens in the order of a set, another in each run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from agreement import Weights, compare_random

# In float32: 16 units in the last place, sums in another order. Else: two roundings to the stored type, and mergekit's
# arithmetic in it where `dtype` says so.
ROUNDING = {"F64": 2e-6, "F32": 2e-6, "F16": 2.0**-10, "BF16": 2.0**-7}
COARSE = 2e-5  # float32: mergekit's scalar products of whole tensors
BY_SCALAR_PRODUCTS = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock")
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
CUTS = {"ties": 1, "breadcrumbs": 2, "breadcrumbs_ties": 2}  # of each task's magnitudes in a tensor
# Of the program that wrote the file, and of how it had loaded the tokenizer.
UNLIKE = ("transformers_version", "_name_or_path", "name_or_path", "is_local", "local_files_only")
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja")
INDEX = "model.safetensors.index.json"
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")  # of the family that has other vocabularies
EXPERT = ".block_sparse_moe."


@dataclass
class Outcome:
    """One row of the table.

    difference  largest, relative to the largest entry of its tensor, of the tensors that are not compared as random
    excepted    entries at a cut
    problems    column -> what differs, "" where nothing does
    """

    name: str
    tensors: int = 0
    difference: float = 0.0
    random: bool = False
    excepted: int = 0
    problems: dict[str, str] = field(default_factory=dict)


def compare(recipe: dict[str, Any], name: str, models: Path, ours: Path, theirs: Path) -> Outcome:
    """ours, theirs: the outputs; NAME.error beside one says why it is not there, or not whole."""
    result = Outcome(name)
    refused = [folder.with_name(f"{name}.error").is_file() for folder in (ours, theirs)]
    if any(refused):
        sides = dict(zip(("pymerge", "mergekit"), refused, strict=True))
        words = ", ".join(f"{program} refuses" for program, no in sides.items() if no)
        result.problems["tensors"] = "" if all(refused) else words
        return result
    first, second = Weights(ours), Weights(theirs)
    if any(EXPERT in name for name in first.entries) and not any(EXPERT in name for name in second.entries):
        first = Fused(first)
        result.problems["layout"] = "experts one by one, mergekit writes them fused"
    result.tensors = len(second.entries)
    rows = rows_by_token(ours, theirs)
    result.problems["tensors"] = compare_tensors(recipe, models, first, second, rows, result)
    result.problems["config.json"] = compare_json(ours / "config.json", theirs / "config.json")
    result.problems["tokenizer"] = compare_files(ours, theirs, rows is not None)
    result.problems["index"] = compare_index(ours, theirs)
    return result


def rows_by_token(ours: Path, theirs: Path) -> list[int] | None:
    """Our id of each token in the order of mergekit's ids; None where no id differs, or the tokens do."""
    mine, other = (ids(folder / "tokenizer.json") for folder in (ours, theirs))
    if mine == other or mine.keys() != other.keys():
        return None
    return [mine[token] for token in sorted(other, key=lambda token: other[token])]


def ids(path: Path) -> dict[str, int]:
    content = read_json(path) or {"model": {"vocab": {}}, "added_tokens": []}
    return content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}


class Fused(Weights):
    """Mixtral's weights with the experts of a layer in one tensor, as transformers 5 has them in memory."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.entries = weights, dict(weights.entries)
        self.parts: dict[str, list[list[str]]] = {}  # name -> of each expert, what is stacked above each other
        for name in weights.entries:
            block, found, rest = name.partition(EXPERT)
            if not found:
                continue
            path, start, entry = self.entries.pop(name)
            if rest == "gate.weight":
                new, parts = f"{block}.mlp.gate.weight", [[name]]
            elif rest.startswith("experts.0.") and "w3" not in rest:
                up = "w1" in rest
                new = f"{block}.mlp.experts.{'gate_up_proj' if up else 'down_proj'}"
                experts = sum(key.startswith(f"{block}{EXPERT}experts.") and ".w2." in key for key in weights.entries)
                own = [name.replace("experts.0.", f"experts.{e}.") for e in range(experts)]
                parts = [[one, one.replace(".w1.", ".w3.")] if up else [one] for one in own]
                rows, columns = entry["shape"]
                entry = entry | {"shape": [experts, rows * (2 if up else 1), columns]}
            else:
                continue
            self.entries[new], self.parts[new] = (path, start, entry), parts

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.parts:
            return self.weights[name]
        return np.concatenate([self.weights[part] for expert in self.parts[name] for part in expert])


def compare_tensors(
    recipe: dict[str, Any], models: Path, ours: Weights, theirs: Weights, rows: list[int] | None, result: Outcome
) -> str:
    """rows: of the vocabulary's tensors, those of our output in the order of mergekit's; None: they are in it."""
    if apart := sorted(ours.entries.keys() ^ theirs.entries.keys()):
        return f"{len(apart)} tensors in one output alone: {', '.join(apart[:3])}"
    wrong = []
    for name, (_, _, entry) in theirs.entries.items():
        mine = ours.entries[name][2]
        if (mine["dtype"], mine["shape"]) != (entry["dtype"], entry["shape"]):
            wrong.append(f"{name} {mine['dtype']} {mine['shape']} for {entry['dtype']} {entry['shape']}")
            continue
        a, b = (x.reshape(entry["shape"]).astype(np.float64) for x in (ours[name], theirs[name]))
        if rows and name in VOCABULARY:
            a[: len(rows)] = a[rows]
        if not is_same(recipe, models, name, a, b, entry["dtype"], result):
            wrong.append(f"{name} by {np.abs(a - b).max():.1e} of {np.abs(b).max():.1e}")
    return f"{len(wrong)} differ: {', '.join(wrong[:3])}" if wrong else ""


def is_same(recipe: dict[str, Any], models: Path, name: str, a: Any, b: Any, dtype: str, result: Outcome) -> bool:
    """Whether two tensors agree; counts what is excepted and notes the largest difference of the others."""
    method = recipe["merge_method"]
    if method in RANDOM and np.any(a != b):
        result.random = True
        base = source(models, recipe["base_model"], name).reshape(a.shape)
        return compare_random(base, a, b)["of_bound"] <= 1
    size = float(np.abs(b).max()) or 1.0
    apart = np.abs(a - b) / size
    bound = max(ROUNDING[dtype], COARSE if method in BY_SCALAR_PRODUCTS else 0)
    outside = apart > bound
    if outside.any() and method in CUTS and is_plain(recipe):
        excepted = outside & at_cut(recipe, models, name, outside)
        result.excepted += int(excepted.sum())
        apart = apart[~excepted]
    result.difference = max(result.difference, float(apart.max(initial=0.0)))
    return bool((apart <= bound).all())


def is_plain(recipe: dict[str, Any]) -> bool:
    """Whether what is merged are the tensors of the recipe's folders as they are."""
    return (
        "models" in recipe
        and not any("tokenizer" in key for key in recipe)
        and all(isinstance(one["model"], str) and "+" not in one["model"] for one in recipe["models"])
    )


def source(models: Path, reference: str, name: str) -> Any:
    return Weights(models / reference)[name]


def at_cut(recipe: dict[str, Any], models: Path, name: str, outside: Any) -> Any:
    """Entries that a cut through equal magnitudes leaves to the order of a sort: of each task the values of one run (of
    two, where two cuts are made) that occur more than once, those first that explain most of what is `outside`."""
    base = source(models, recipe["base_model"], name)
    tuned = [source(models, one["model"], name) for one in recipe["models"] if one["model"] != recipe["base_model"]]
    magnitudes = [np.abs(one - base).reshape(outside.shape) for one in tuned]
    cuts = [CUTS[recipe["merge_method"]]] * len(tuned)
    found = np.zeros(outside.shape, dtype=bool)
    while True:
        runs = []
        for task, magnitude in enumerate(magnitudes):
            for value, count in zip(*np.unique(magnitude[outside & ~found], return_counts=True), strict=True):
                if cuts[task] and np.count_nonzero(magnitude == value) > 1:
                    runs.append((count, task, value))
        if not runs:
            return found
        _, task, value = max(runs)
        cuts[task] -= 1
        found |= magnitudes[task] == value


def compare_json(ours: Path, theirs: Path, *, by_token: bool = False) -> str:
    """Keys in which two JSON files differ, and how. by_token: the ids of added tokens do not count."""
    mine, other = read_json(ours), read_json(theirs)
    if mine is None or other is None:
        return "" if mine is other else "in one output alone"
    if by_token and "added_tokens" in mine and "added_tokens" in other:
        for one in (mine, other):
            tokens = sorted(one["added_tokens"], key=lambda token: token["content"])
            one["added_tokens"] = [{key: value for key, value in token.items() if key != "id"} for token in tokens]
    keys = [key for key in sorted({*mine, *other} - {*UNLIKE}) if mine.get(key) != other.get(key)]
    return ", ".join(f"{key}: {short(mine.get(key))} for {short(other.get(key))}" for key in keys)


def read_json(path: Path) -> Any:
    """None: there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else None


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 30 else text[:27] + "..."


def compare_files(ours: Path, theirs: Path, reordered: bool) -> str:
    """Tokenizer files: the same ones, with the same content (JSON: the same values; templates: the same prompts)."""
    names = sorted({path.name for folder in (ours, theirs) for p in TOKENIZER for path in folder.glob(p)})
    problems = []
    for name in names:
        if not ((ours / name).is_file() and (theirs / name).is_file()):
            problem = "in one output alone"
        elif name.endswith(".json"):
            problem = compare_json(ours / name, theirs / name, by_token=reordered)
        else:
            read = prompts if name.endswith(".jinja") else str
            problem = "" if len({read((folder / name).read_text()) for folder in (ours, theirs)}) == 1 else "other text"
        if problem:
            problems.append(f"{name}: {problem}")
    return "; ".join(problems)


def prompts(template: str) -> tuple[str, str]:
    """What a chat template makes of TALK, without and with the start of an answer."""
    from jinja2.sandbox import SandboxedEnvironment

    made = SandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    short, whole = (made.render(messages=TALK, add_generation_prompt=asked) for asked in (False, True))
    return short, whole


def compare_index(ours: Path, theirs: Path) -> str:
    """The index, or its absence, and that it names the tensors that there are."""
    mine, other = read_json(ours / INDEX), read_json(theirs / INDEX)
    if mine is None or other is None:
        return "" if mine is other else "in one output alone"
    return "" if mine["weight_map"].keys() == other["weight_map"].keys() else "other names"
