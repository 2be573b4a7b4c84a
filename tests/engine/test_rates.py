"""Rates: units, the file that keeps them, and what `--simulate` takes."""

import dataclasses
from pathlib import Path

import pytest

from pymerge.engine.cluster import PUBLISHED, parse_cluster
from pymerge.engine.rates import KERNELS, Rates, known_rates, parse_rate, rates_file
from pymerge.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5GB/s", 5e9),
        ("1.5 GB/s", 1.5e9),
        ("800MB/s", 8e8),
        ("2GiB/s", 2 * 2**30),
        ("3TiB/s", 3 * 2**40),
        ("100Gbit/s", 1.25e10),
    ],
)
def test_bytes_a_second(text, value):
    assert parse_rate("disk", text, "B/s") == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("text", ["5", "5GB", "5Gb/s", "5gb/s", "-5GB/s", "0GB/s", "5 G B/s", "1e3MB/s", "5TFLOP/s"])
def test_other_spellings_are_no_rates(text):
    with pytest.raises(RecipeError, match="disk: .* is no rate: write a number above 0 with its unit"):
        parse_rate("disk", text, "B/s")


def test_operations_a_second():
    assert parse_rate("gpu", "60TFLOP/s", "FLOP/s") == 6e13
    for text in ("60TB/s", "60TFLOPS", "60TiFLOP/s"):
        with pytest.raises(RecipeError, match="60TFLOP/s"):
            parse_rate("gpu", text, "FLOP/s")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_rates_are_kept_for_this_machine_and_version(cache):
    assert known_rates() == Rates()
    rates = Rates().given({"disk": 2e9}, "measured")
    assert rates.save() == rates_file() == cache / "pymerge" / "rates.json"
    assert known_rates() == rates
    assert (known_rates().source("disk"), known_rates().source("write")) == ("measured", "built in")
    rates_file().write_text(rates_file().read_text().replace('"processors": ', '"processors": 9'))
    assert known_rates() == Rates()
    rates_file().write_text("{")
    assert known_rates() == Rates()


def test_a_calibration_measures_every_rate(cache, tmp_path, monkeypatch):
    from pymerge.engine import calibrate

    monkeypatch.setattr(calibrate, "ENTRIES", 1 << 14)
    monkeypatch.setattr(calibrate, "FEW", 1 << 12)
    monkeypatch.setattr(calibrate, "SIDE", 64)
    monkeypatch.setattr(calibrate, "SMALL_SIDE", 32)
    monkeypatch.setattr(calibrate, "FILE_BYTES", 16 << 20)
    monkeypatch.setattr(calibrate, "ROUNDS", 1)
    monkeypatch.setattr(calibrate, "STARTS", 1)
    monkeypatch.setattr(calibrate, "LARGE_SIDE", 1024)
    found = calibrate.calibrate(tmp_path)
    numbers = {f.name for f in dataclasses.fields(Rates)} - {"sources"}
    assert set(found.sources) == numbers
    assert set(found.sources.values()) == {"measured"}
    assert all(getattr(found, name) > 0 for name in numbers - {"kernels"})
    assert set(found.kernels) == set(KERNELS)
    assert min(found.kernels.values()) >= 0
    assert list(tmp_path.iterdir()) == []  # nothing is left on the disk


def test_a_cluster_in_words():
    text = "nodes=16, gpus=8,gpu=h100,disk=5GB/s,write=2GB/s,net=100Gbit/s,storage=40GB/s"
    cluster = parse_cluster(text, Rates(), 2)
    assert (cluster.nodes, cluster.gpus, cluster.cores) == (16, 8, 2)
    assert (cluster.rates.disk, cluster.rates.write, cluster.net, cluster.storage) == (5e9, 2e9, 1.25e10, 4e10)
    assert (cluster.rates.source("disk"), cluster.rates.source("single")) == ("given", "built in")
    assert cluster.gpu == PUBLISHED["h100"]
    assert cluster.gpu.source == "published, not measured"
    assert cluster.eigen == pytest.approx(67e12 / 30)
    assert "assumed" in cluster.eigen_source


def test_given_rates_of_gpus():
    cluster = parse_cluster("gpus=1,gpu=60TFLOP/s,double=30TFLOP/s,eigen=1TFLOP/s,link=50GB/s", Rates(), 2)
    assert cluster.gpu is not None
    assert (cluster.gpu.single, cluster.gpu.double, cluster.gpu.link) == (6e13, 3e13, 5e10)
    assert (cluster.eigen, cluster.eigen_source) == (1e12, "given")
    assert "double, link given" in cluster.gpu.source


def test_other_cores_have_memory_in_proportion():
    assert parse_cluster("cores=64", Rates(), 2).rates.memory == 32 * Rates().memory
    assert "in proportion" in parse_cluster("cores=64", Rates(), 2).rates.source("memory")
    assert parse_cluster("cores=64,memory=300GB/s", Rates(), 2).rates.memory == 3e11
    assert parse_cluster("single=1TFLOP/s", Rates(), 2).rates.single == 1e12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node=2", "unknown 'node', did you mean nodes"),
        ("nodes", "nodes has no value"),
        ("nodes=2,nodes=3", "nodes is given twice"),
        ("nodes=0", "nodes: '0' is no whole number from 1"),
        ("nodes=2.5", "nodes: '2.5' is no whole number"),
        ("disk=5", "disk: '5' is no rate"),
        ("gpu=h100", "give gpus= too"),
        ("link=5GB/s", "give gpus= too"),
        ("gpus=1,gpu=x9", "neither one of h100 nor a rate"),
    ],
)
def test_what_does_not_fit_is_refused(text, message):
    with pytest.raises(RecipeError, match=message):
        parse_cluster(text, Rates(), 2)


def test_all_problems_at_once():
    with pytest.raises(RecipeError, match=r"(?s)--simulate: .*nodes.*--simulate: .*disk"):
        parse_cluster("nodes=0,disk=5", Rates(), 2)


def test_what_is_merged_to_calibrate_is_as_large_as_weights(tmp_path):
    """Subnormal numbers would be timed, not the merge."""
    import torch

    from pymerge.engine.calibrate import write_model
    from tests.models import read_model

    for number in range(3):
        (values,) = read_model(Path(write_model(tmp_path / str(number), 64, number))).values()
        assert 1e-6 < float(values.float().abs().min()) and float(values.float().abs().max()) < 1.0
        assert torch.isfinite(values).all()
