"""Hydra finds this module by its place: it puts pymerge's configs in reach of `fusion_bench method=pymerge/...`."""
# pyright: reportMissingImports=false

from importlib.metadata import entry_points
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin

COMMON = {"exclude_keys": [], "purify": None, "calibrate": None, "spectral": None, "seed": None}
COMMON |= {"samples": 32, "batch_size": 8, "dataset": "train"}


class PymergeConfigs(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="pymerge", path="pkg://pymerge.integrations.fusion_bench_conf")
        if entry_points(group="pymerge.methods"):  # methods of other packages have no files; else nothing is imported
            from pymerge import methods

            for name in methods.list():
                if methods.get(name).package:
                    ConfigStore.instance().store(name, config_of(name), group="method/pymerge", provider="pymerge")


def config_of(name: str) -> dict[str, Any]:
    """What the packaged files say of pymerge's own methods: the authors' defaults."""
    from pymerge.methods import UNUSED, Auto, describe

    info, given = describe(name), {}
    for p in info.parameters:
        if p.name != "style" and p.default != UNUSED:
            given[p.name] = "???" if p.default is None else None if isinstance(p.default, Auto) else p.default
    config = {"_target_": "pymerge.integrations.fusion_bench.PymergeAlgorithm", **COMMON}
    if info.step == "combine":
        return config | {"merge_method": name, **given}
    return config | {"merge_method": "task_arithmetic", info.step: {"method": name, **given}}
