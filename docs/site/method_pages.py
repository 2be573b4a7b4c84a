"""Pages of the methods, from what their classes say of themselves and from methods.yaml."""

from __future__ import annotations

import inspect
import json
import re
import struct
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pymerge import methods
from pymerge.methods import Method, MethodInfo, TensorInfo
from pymerge.methods.base import AdapterCombine

ROOT = Path(__file__).parents[2]
SIZE = TensorInfo(name="model.layers.0.mlp.up_proj.weight", shape=(4096, 4096), tasks=4, depth=0.0)
STEPS = {"purify": "Purify", "combine": "Combine", "calibrate": "Calibrate"}


@cache
def written() -> dict[str, dict[str, Any]]:
    """methods.yaml."""
    return yaml.safe_load((ROOT / "docs/site/methods.yaml").read_text())


@cache
def readme_rows() -> dict[str, dict[str, str]]:
    """The README's table of methods: {name: {column: cell}}."""
    section = (ROOT / "README.md").read_text().partition("\n## Methods\n")[2].partition("\n### ")[0]
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    rows = [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]
    return {name: row for row in rows for name in re.findall(r"`(\w+)`", row["method"])}


def what(name: str) -> str:
    """A method in a few words."""
    return written()[name].get("what") or readme_rows()[name]["what it does"]


def example(name: str) -> dict[str, Any]:
    """A recipe of the method, for the models that the pages' recipes have."""
    info, given = methods.describe(name), dict(written()[name].get("example", {}))
    if any(p.name == "weight" and p.mergekit_default is None for p in info.parameters):
        given = {"weight": 1} | given
    if info.step != "combine":
        step = {"method": name} | given if given else name
        first = {"merge_method": "task_arithmetic", info.step: step, "parameters": {"weight": 1}}
        return first | {"base_model": "./base"} | models_of(info, 2)
    recipe: dict[str, Any] = {"merge_method": name}
    if name == "passthrough":
        ranges = ((0, 2), (1, 2))
        sources = [{"model": f"./{m}", "layer_range": list(r)} for m, r in zip(("math", "code"), ranges, strict=True)]
        return recipe | {"slices": [{"sources": [source]} for source in sources]}
    if info.base != "none":
        recipe["base_model"] = "./base"
    return recipe | models_of(info, info.models[1] or 2) | ({"parameters": given} if given else {})


def models_of(info: MethodInfo, count: int) -> dict[str, Any]:
    suffix = "-lora" if "adapters" in info.needs else ""
    entries: list[dict[str, str]] = [{"model": f"./{task}{suffix}"} for task in ("math", "code")[:count]]
    beside = {"covariance": ("statistics", "stats.safetensors"), "fisher": ("fisher", "fisher.safetensors")}
    for need in info.needs:
        for task, entry in zip(("math", "code"), entries, strict=False):
            if methods.get(info.name).sequential:
                entry["data"] = f"{task}.jsonl"
            elif need in beside:
                entry[beside[need][0]] = f"{task}.{beside[need][1]}"
    return {"models": entries}


@cache
def golden_sources() -> dict[str, list[str]]:
    """Where the answers of the committed golden files come from (their headers say it), by folder and variant."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests/golden/data").glob("*/*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(*struct.unpack("<Q", file.read(8))))
        params = json.loads(header["__metadata__"]["params"])
        variant = params.get("variant") if isinstance(params, dict) else None
        folder = "esmpp" if header["__metadata__"]["method"] == "esm++" else path.parent.name
        name = {None: folder, "dare_task_arithmetic": "dare_linear"}.get(variant, variant)
        source = re.match(r"([^@]+)@(\w{7})\w* ([\w./-]+)", header["__metadata__"]["source"])
        text = f"{source[1]}, {source[3]} at {source[2]}" if source else header["__metadata__"]["source"]
        if text not in found.setdefault(name, []):
            found[name].append(text)
    return found


def paper(text: str) -> str:
    """A citation with its links."""
    text = re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", text)
    text = re.sub(r"doi (10\.\S+?)(?=[;,]|$)", r"[doi \1](https://doi.org/\1)", text)
    return re.sub(r"(?<!\()(https?://\S+)$", r"<\1>", text)


def options(info: MethodInfo) -> str:
    if not info.parameters:
        return "It has no hyperparameters.\n"
    lines = ["| option | in Python | in YAML | range | meaning |", "| --- | --- | --- | --- | --- |"]
    for p in info.parameters:
        defaults = ["must be given" if d is None else str(d) for d in (p.default, p.mergekit_default)]
        meaning = p.doc + ("; one, or one a model" if p.per_model else "")
        cells = [f"`{p.name}`", *defaults, p.range, meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
    ignored = ", ".join(f"`{name}`" for name in info.ignored)
    return "\n".join([*lines, "", f"Accepted without effect: {ignored}." if ignored else "", ""])


def cost(name: str, row: dict[str, str]) -> str:
    """What a step takes, by its own estimates."""
    step = methods.get(name)(**written()[name].get("example", {}))
    reads = f"The inputs are read {row['reads the inputs']}. " if row["reads the inputs"] else ""
    if isinstance(step, AdapterCombine):
        memory, of = step.factor_workspace(SIZE, 16 * SIZE.tasks), "4 adapters of rank 16"
    else:
        memory, of = step.workspace(SIZE), "4 tasks"
    if not memory:
        return reads + "It is done on streams of entries, in as little memory as is asked for.\n"
    estimated = type(step).flops is not Method.flops
    work = f", and with {step.flops(SIZE) / 1e12:.1f} TFLOP" if estimated else ""
    parts = {"tensor": "", "rows": " Rows may come piece by piece.", "entries": " Entries may come piece by piece."}
    return (
        f"{reads}For a matrix of 4096 x 4096 and {of} a step plans with {memory / 1e6:.0f} MB beside inputs and result"
        f"{work}.{parts[step.unit]}\n"
    )


def page(name: str) -> str:
    """The page of one method."""
    info, said, row = methods.describe(name), written()[name], readme_rows()[name]
    tests = said.get("tests", [f"tests/methods/test_{name}.py"])
    needs = {"covariance": "statistics of each task (`pymerge observe`), or `data`", "fisher": "Fisher information"}
    needs |= {"adapters": "LoRA adapters in place of whole models"}
    wants = "; ".join(needs[need] for need in info.needs) or "no data"
    if methods.get(name).sequential:
        wants = "samples of each task (`data`)"
    few, many = info.models
    count = f"{few}" if few == many else f"{few} or more" if many is None else f"{few} to {many}"
    count += " fine-tuned model" if count == "1" else " fine-tuned models"
    base = {"required": "a base", "optional": "a base or none", "none": "no base", "first": "a base as the first model"}
    recipe = yaml.safe_dump(example(name), sort_keys=False, default_flow_style=None, width=110)
    parts = [
        f"# {name}\n",
        f"{STEPS[info.step]} step: {what(name)}. Needs {base[info.base]}, {count}, {wants}.\n",
        f"**When.** {said['when']}\n",
        "## Formula\n",
        f"```text\n{inspect.cleandoc(methods.get(name).__doc__ or '')}\n```\n",
        "D_t is the task vector W_t - W_0 of task t of T, W_0 the base.\n",
        "## Recipe\n",
        f"```yaml\n{recipe}```\n",
        "## Options\n",
        options(info),
        "## Cost\n",
        cost(name, row),
        "## Citation\n",
        f"{paper(info.paper)}\n",
        "## What the tests compare with\n",
        f"{said['compare'][0].upper()}{said['compare'][1:]} In {', '.join(f'`{test}`' for test in tests)}.\n",
    ]
    if sources := golden_sources().get(name):
        parts += ["Golden files were made by:\n", *(f"- `{source}`" for source in sources), ""]
    return "\n".join(parts)


def overview() -> str:
    """The list of all methods, by step."""
    known, parts = written(), ["# Methods\n"]
    parts.append("A merge is `purify`, then `combine`, then `calibrate`; only the second must be there.\n")
    for step, title in STEPS.items():
        parts += [f"## {title}\n", "| method | what it does | when |", "| --- | --- | --- |"]
        for name in methods.list(step):
            parts.append(f"| [{name}]({name}.md) | {what(name)} | {known[name]['when']} |")
        parts.append("")
    parts.append(
        "What is defined otherwise than in mergekit: [SCE, NearSwap, Arcee Fusion, RAM](mergekit_methods.md).\n"
    )
    return "\n".join(parts)
