"""The configs that FusionBench users choose a method by, made from pymerge.methods.describe.

python tests/integrations/fusion_bench_configs.py   writes them (`make fusion-bench-configs`)
"""

from pathlib import Path
from typing import Any

import yaml

from pymerge import methods
from pymerge.methods.param import UNUSED, Auto

FOLDER = Path(__file__).parents[2] / "pymerge/integrations/fusion_bench_conf/method/pymerge"
COMMON = {
    "exclude_keys": ([], "name patterns of tensors that stay as in the base"),
    "purify": (None, "{purify}, or a mapping with its hyperparameters: a step in front of the merge"),
    "calibrate": (None, "{calibrate}, likewise: a step after it"),
    "spectral": (None, "which matrices are decomposed, where methods decompose: {{include: [...], exclude: [...]}}"),
    "seed": (None, "of random methods; default 0"),
    "samples": (32, "of each task's dataset, for steps that need to know the inputs of layers (esm, regmean, pave)"),
    "batch_size": (8, "samples that are run at once"),
    "dataset": ("train", "train, val or test: which of the pool's datasets they are taken from"),
}


def line(key: str, value: Any, comment: str, indent: str = "") -> list[str]:
    """The comment, and below it the entry, as OmegaConf reads it."""
    written = "???" if value == "???" else yaml.safe_dump(value).partition("\n")[0]
    return [f"{indent}# {' '.join(comment.split())}", f"{indent}{key}: {written}"]


def hyperparameters(name: str, indent: str = "") -> list[str]:
    lines = []
    for p in methods.describe(name).parameters:
        if p.name == "style" or p.default == UNUSED:
            continue  # the authors' style
        about = f"{p.doc} ({p.range}{'; a list: one a model' if p.per_model else ''})"
        if isinstance(p.default, Auto):
            lines += line(p.name, None, f"{about}; default: {p.default}", indent)
        else:
            lines += line(p.name, "???" if p.default is None else p.default, about, indent)
    return lines


def config(name: str) -> str:
    """The config of a combine method, or of a purify or calibrate step around task arithmetic."""
    info = methods.describe(name)
    lines = [f"# {name} ({info.paper}), made from `pymerge methods {name}`"]
    lines += ["_target_: pymerge.integrations.fusion_bench.PymergeAlgorithm"]
    if info.step == "combine":
        lines += [f"merge_method: {name}", *hyperparameters(name)]
    else:
        lines += line("merge_method", "task_arithmetic", "any combine method; its hyperparameters: +method.scale=0.5")
    if "fisher" in info.needs:
        lines += line("fisher", "???", "a list with one file a model: the diagonal of its Fisher information")
    steps = {step: ", ".join(methods.list(step)) for step in ("purify", "calibrate")}
    for key, (value, comment) in COMMON.items():
        if key == info.step:
            lines += [f"{key}:", f"  method: {name}", *hyperparameters(name, "  ")]
        else:
            lines += line(key, value, comment.format(**steps))
    return "\n".join(lines) + "\n"


def packaged() -> tuple[str, ...]:
    """The methods that merge models in memory: the others leave a file beside the model, or merge adapters, or one
    model."""
    return tuple(name for name in methods.list() if merges_in_memory(name))


def merges_in_memory(name: str) -> bool:
    cls = methods.get(name)
    return not getattr(cls, "beside", "") and "adapters" not in cls.needs and name != "passthrough"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob("*.yaml"):
        old.unlink()
    for name in packaged():
        (FOLDER / f"{name}.yaml").write_text(config(name), encoding="utf-8")
