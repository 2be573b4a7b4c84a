"""The recipes of the quality suite, as data. What is not said here is the method's default: that of its paper."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pymerge.demo.merges import needed


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One row: a combine method and what goes with it, as keywords of pymerge.merge.

    kind      seed: a method of the five papers, alone or in a combination that its paper claims; baseline: the others
    per_task  masks, experts: one model, and a little for each task beside it, which pymerge.runtime adds"""

    name: str
    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    kind: Literal["seed", "baseline"] = "baseline"
    per_task: Literal["", "masks", "experts"] = ""

    @property
    def observed(self) -> str:
        """What it must know of the layers' inputs: "" nothing, "statistics" of each model, "data" samples of each."""
        steps = [self.parameters[step] for step in ("purify", "calibrate") if step in self.parameters]
        names = [self.method, *(step if isinstance(step, str) else step["method"] for step in steps)]
        return next((given for name in names if (given := needed(name)[0])), "")

    @property
    def data_free(self) -> bool:
        """One model for all tasks from weights alone, by one method."""
        return not (self.observed or self.per_task or "calibrate" in self.parameters)


def baseline(name: str, method: str, **parameters: Any) -> Recipe:
    return Recipe(name=name, method=method, parameters=parameters)


def seed(name: str, method: str, **parameters: Any) -> Recipe:
    return Recipe(name=name, method=method, parameters=parameters, kind="seed")


def purified(name: str, method: str, rank_ratio: float, per_task: Literal["", "masks"] = "") -> Recipe:
    """rank_ratio: what the authors' scripts for RoBERTa give this combine method."""
    step = {"method": "pave", "rank_ratio": rank_ratio}
    return Recipe(name=name, method=method, parameters={"purify": step}, kind="seed", per_task=per_task)


RECIPES = (
    baseline("linear", "linear"),
    baseline("karcher", "karcher"),
    baseline("model stock", "model_stock"),
    baseline("TA", "task_arithmetic"),
    baseline("TIES", "ties"),
    baseline("DARE", "dare_linear"),
    baseline("DELLA", "della"),
    baseline("breadcrumbs", "breadcrumbs"),
    baseline("SCE", "sce"),
    baseline("consensus TA", "consensus"),
    baseline("PCB", "pcb"),
    baseline("TA + LiNeS", "task_arithmetic", calibrate="lines", scale=1.0),  # 1 / T at the first layer, 1 at the last
    baseline("STAR", "star"),
    baseline("CART", "cart"),
    baseline("WUDI", "wudi"),
    baseline("Iso-C", "iso_c"),
    baseline("Iso-CTS", "iso_cts"),
    baseline("TSV-M", "tsv_m"),
    baseline("RegMean", "regmean"),
    baseline("RegMean++", "regmean_plusplus"),
    Recipe(name="EMR", method="emr", per_task="masks"),
    seed("ACE", "ace"),
    seed("ACE released", "ace", preset="released"),  # as the authors' code, which has another ridge than the paper
    seed("ESM", "esm"),
    Recipe(name="ESM++", method="esmpp", kind="seed", per_task="experts"),
    purified("PAVE + TA", "task_arithmetic", 0.96875),
    purified("PAVE + TIES", "ties", 0.984375),
    purified("PAVE + EMR", "emr", 0.875, "masks"),
    seed("TA + SVC", "task_arithmetic", calibrate="svc"),
    seed("TIES + SVC", "ties", calibrate="svc"),
    seed("DARE + SVC", "dare_linear", calibrate="svc"),
    seed("TSV-M + SVC", "tsv_m", calibrate="svc"),
    seed("Iso-C + SVC", "iso_c", calibrate="svc"),
)
BY_NAME = {recipe.name: recipe for recipe in RECIPES}
