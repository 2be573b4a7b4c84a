"""Inputs on disks that are slow, read-only or full of links: the merge goes on, within its memory."""

from __future__ import annotations

import os
import time

import pytest

import pymerge
from pymerge.engine.process import resident_memory
from pymerge.errors import InputError, RecipeError
from tests.models import family, read_model, same

SHAPES = {f"layers.{i}.w": (256, 400) for i in range(20)}
OPTIONS = pymerge.Options(memory=160_000_000, threads=2, progress=False)


def merged(base, children, out, **options):
    pymerge.merge(base, children, method="ties", density=0.3, out=out, options=OPTIONS, **options)
    return read_model(out)


def test_a_slow_disk_changes_neither_bytes_nor_memory(tmp_path, monkeypatch):
    base, children = family(tmp_path, 3, SHAPES)
    wanted = merged(base, children, tmp_path / "fast")
    before, peak, read = resident_memory(), [0], os.preadv

    def throttled(fd, buffers, offset):
        time.sleep(0.005)
        peak[0] = max(peak[0], resident_memory())
        return read(fd, [buffers[0][: 64 << 10]], offset)  # no disk has to give all that is asked for

    monkeypatch.setattr(os, "preadv", throttled)
    assert same(merged(base, children, tmp_path / "slow"), wanted)
    assert peak[0] - before <= OPTIONS.memory_bytes


def test_read_only_inputs_stay_as_they_are(tmp_path):
    base, children = family(tmp_path, 2, SHAPES)
    files = [path for folder in (base, *children) for path in folder.iterdir()]
    for path in files:
        path.chmod(0o444)
    for folder in (base, *children):
        folder.chmod(0o555)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}
    try:
        merged(base, children, tmp_path / "out")
        assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files} == before
        assert all(os.access(path, os.W_OK) for path in (tmp_path / "out").iterdir())
    finally:
        for folder in (base, *children):
            folder.chmod(0o755)


@pytest.mark.parametrize("what", ["folder", "config.json", "model.safetensors"])
def test_links_in_a_circle_are_an_error(tmp_path, what):
    base, children = family(tmp_path, 2)
    victim = children[1] if what == "folder" else children[1] / what
    target = victim.rename(tmp_path / "moved") if what == "folder" else victim.unlink()
    assert target is None or target.exists()
    os.symlink(tmp_path / "circle", victim)
    os.symlink(victim, tmp_path / "circle")
    with pytest.raises((InputError, RecipeError)):
        merged(base, children, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_linked_models_are_read_through_their_links(tmp_path):
    base, children = family(tmp_path, 2, SHAPES)
    wanted = merged(base, children, tmp_path / "plain")
    links = [tmp_path / f"link{i}" for i in range(2)]
    for link, child in zip(links, children, strict=True):
        os.symlink(child, link)
    assert same(merged(base, links, tmp_path / "linked"), wanted)
