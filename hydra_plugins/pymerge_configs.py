"""Hydra finds this module by its place: it puts pymerge's configs in reach of `fusion_bench method=pymerge/...`."""
# pyright: reportMissingImports=false

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class PymergeConfigs(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="pymerge", path="pkg://pymerge.integrations.fusion_bench_conf")
