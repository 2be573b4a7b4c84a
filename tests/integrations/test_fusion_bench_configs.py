"""The packaged FusionBench configs say what the methods say of themselves. Needs no FusionBench."""

import pytest

from tests.integrations.fusion_bench_configs import FOLDER, config, packaged


@pytest.mark.parametrize("name", packaged())
def test_config_is_current(name):
    assert (FOLDER / f"{name}.yaml").read_text() == config(name), "run `make fusion-bench-configs`"


def test_every_config_has_a_method():
    assert {path.stem for path in FOLDER.iterdir()} == set(packaged())
