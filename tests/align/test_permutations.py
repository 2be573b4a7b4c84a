"""Permutations: what they do to tensors, which ones are refused, and files of them."""

import json
import stat
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pymerge.align import Clusters, Entry, Heads, Permutations, Spec, Tap, Units, open_permutations
from pymerge.align.permutations import identity
from pymerge.align.random_permutations import random_permutations
from pymerge.errors import CorruptFile, InputError

HEADS = Heads(
    name="heads",
    heads=4,
    kv_heads=2,
    width=4,
    rotary=2,
    entries=(
        Entry(parameter="q.weight", axis=0, role="out", view="q"),
        Entry(parameter="kv.weight", axis=0, role="out", view="k", part=(0, 2), interleave=2),
        Entry(parameter="kv.weight", axis=0, role="out", view="v", part=(1, 2), interleave=2),
        Entry(parameter="o.weight", axis=1, role="in", view="o"),
    ),
    taps=(Tap(module="kv", side="output", view="k", part=(0, 2), interleave=2),),
)
BLOCKS = Units(
    name="blocks",
    size=6,
    blocks=3,
    entries=(
        Entry(parameter="conv.weight", axis=0, role="out"),
        Entry(parameter="linear.weight", axis=1, role="in", span=2, similarity=False),
    ),
)
EXPERTS = Units(
    name="experts",
    size=2,
    entries=(Entry(parameter="gate.weight", axis=0, role="out"),),
    members=(("experts.0.up", "experts.0.down"), ("experts.1.up", "experts.1.down")),
)
SPEC = Spec(groups=(HEADS, BLOCKS, EXPERTS), fixed=("*.bias",))
SHAPES = {
    "q.weight": (16, 3),
    "kv.weight": (16, 3),
    "o.weight": (3, 16),
    "conv.weight": (6, 2, 3),
    "gate.weight": (2, 3),
}
SHAPES |= {"linear.weight": (3, 12), "linear.bias": (3,)}
SHAPES |= {f"experts.{e}.{name}": (5, 3) for e in range(2) for name in ("up", "down")}


def drawn(seed=0):
    return random_permutations(SPEC, ("a", "b", "c"), torch.Generator().manual_seed(seed))


def with_units(permutations, group, view, vector):
    rows = permutations.index[group][view].clone()
    rows[1] = torch.as_tensor(vector)
    return replace(permutations, index={**permutations.index, group: {**permutations.index[group], view: rows}})


def test_random_permutations_are_allowed_and_reach_every_order():
    SPEC.check(SHAPES)
    seen = {view: set() for view in ("q", "k", "v", "o")}
    for seed in range(300):
        permutations = drawn(seed)
        permutations.check()
        for view, orders in seen.items():
            orders.add(tuple(permutations.index["heads"][view][1].tolist()))
    # sigma 2!, kappa 2! a key-value head, rho 4! a key-value head, tau 2! a key-value head
    assert len(seen["k"]) == 2 * 2**2
    assert len(seen["q"]) == 2 * 2**2 * 2**2
    assert len(seen["v"]) > 250 and len(seen["o"]) > 250  # of 2 * 24^2 and more


def test_axes_in_parts_and_with_several_positions_a_unit():
    heads = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])  # the two key-value heads change places
    permutations = identity(SPEC, ("a", "b", "c"))
    permutations = with_units(permutations, "heads", "k", heads)
    kv = torch.arange(16)  # head 0: k 0..3, v 4..7; head 1: k 8..11, v 12..15
    moved = permutations.aligned("kv.weight", kv[:, None].expand(16, 3), 1)[:, 0]
    assert moved.tolist() == [8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15]
    permutations = with_units(permutations, "heads", "v", heads)
    moved = permutations.aligned("kv.weight", kv[:, None].expand(16, 3), 1)[:, 0]
    assert moved.tolist() == [*range(8, 16), *range(8)]
    permutations = with_units(permutations, "blocks", "units", [3, 2, 0, 1, 4, 5])
    moved = permutations.aligned("linear.weight", torch.arange(12).expand(3, 12), 1)[0]
    assert moved.tolist() == [6, 7, 4, 5, 0, 1, 2, 3, 8, 9, 10, 11]
    still = torch.zeros(3)
    assert permutations.aligned("linear.bias", still, 1) is still


@pytest.mark.parametrize(
    ("group", "view", "vector", "message"),
    [
        ("blocks", "units", [0, 1, 2, 3, 4, 4], "view units is no permutation"),
        ("blocks", "units", [1, 2, 0, 3, 4, 5], "units leave their 3 blocks"),
        ("heads", "v", [0, 1, 2, 4, 3, 5, 6, 7], "channels leave their heads of 4"),
        ("heads", "v", [4, 5, 6, 7, 0, 1, 2, 3], "q, k, v and o differ in the order of heads"),
        ("heads", "v", [1, 0, 2, 3, 4, 5, 6, 7], "channels move differently in q and k, or in v and o"),
        ("heads", "k", [0, 1, 3, 2, 4, 5, 6, 7], "channels move differently in q and k, or in v and o"),
    ],
)
def test_what_a_group_does_not_allow(group, view, vector, message):
    wrong = with_units(identity(SPEC, ("a", "b", "c")), group, view, vector)
    with pytest.raises(InputError, match=f"group {group}, model b: {message}"):
        wrong.check()


def test_anchors_move_and_missing_views_are_found():
    permutations = drawn()
    turned = {view: rows.flip(0) for view, rows in permutations.index["heads"].items()}
    lost = {"units": permutations.index["blocks"]["units"][:, :4]}
    with pytest.raises(InputError) as error:
        replace(permutations, index={"heads": turned, "blocks": lost}).check()
    assert "group heads, model a: the anchor's units move" in str(error.value)
    assert "group blocks: index vectors {'units': (3, 4)}, expected {'units': (3, 6)}" in str(error.value)
    assert "group experts: index vectors {'units': None}" in str(error.value)


def test_a_whole_axis_and_a_part_of_it_are_two_groups():
    cut = ((8, (0, 1)), (4, (0, 2)))
    groups = (
        Units(name=f"of {n}", size=n, entries=(Entry(parameter="w", axis=0, role="out", part=part),)) for n, part in cut
    )
    with pytest.raises(InputError, match="w: axis 0 is in two groups, one is of 4"):
        Spec(groups=tuple(groups)).check({"w": (8, 3)})


def test_members_must_be_alike():
    with pytest.raises(InputError, match="group experts: unit 1 has parameters of shapes"):
        SPEC.check(SHAPES | {"experts.1.down": (5, 4)})


def test_entries_that_no_axis_can_have():
    entries = [Entry(parameter=f"{i}", axis=0, role="out", **kw) for i, kw in enumerate(
        ({"part": (2, 2)}, {"span": 0}, {"interleave": 4}, {"view": "q"})
    )]  # fmt: skip
    with pytest.raises(InputError) as error:
        Spec(groups=(replace(BLOCKS, entries=tuple(entries)),)).check({})
    for message in (
        "0: axis 0 has no part (2, 2)",
        "1: axis 0 has no",
        "2: 6 units cannot be cut into 4",
        "3: group blocks has",
    ):
        assert f"\n{message}" in str(error.value)


def test_a_file_gives_back_what_was_saved(tmp_path):
    path = tmp_path / "perms.safetensors"
    fingerprints = tuple({"path": f"/{label}", "files": [["m", 1, 2, "d"]]} for label in "abc")
    saved = replace(
        drawn(), report={"alpha": 0.5, "groups": {"heads": {"moved": [3, None]}}}, fingerprints=fingerprints
    )
    saved.save(path)
    found = open_permutations(path)
    assert isinstance(found, Permutations)
    assert (found.spec, found.models, found.fingerprints) == (saved.spec, saved.models, saved.fingerprints)
    assert found.report == saved.report
    for name, views in saved.index.items():
        assert all(torch.equal(found.index[name][view], rows) for view, rows in views.items())
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_clusters_too(tmp_path):
    spec = Spec(groups=(BLOCKS,))
    index = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 2, 5, 4, 5]])
    saved = Clusters(spec=spec, index={"blocks": {"units": index}}, models=("a", "b"))
    saved.save(tmp_path / "zip.safetensors")
    found = open_permutations(tmp_path / "zip.safetensors")
    assert isinstance(found, Clusters) and torch.equal(found.index["blocks"]["units"], index)
    replace(saved, index={"blocks": {"units": index.clamp(max=4)}}).save(tmp_path / "zip.safetensors")
    with pytest.raises(InputError, match="its clusters are not 0 to 5"):
        open_permutations(tmp_path / "zip.safetensors")


def changed(path, **metadata):
    """The file with other text."""
    with safe_open(path, "pt") as file:
        tensors, text = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    save_file(tensors, path, metadata=text | metadata)


def test_files_that_are_not_what_they_should_be(tmp_path):
    path = tmp_path / "perms.safetensors"
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="a folder, no file of permutations"):
        open_permutations(tmp_path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(InputError, match=r"no file of permutations of format 1 \(found: none\)"):
        open_permutations(path)
    drawn().save(path)
    changed(path, pymerge_permutations="2")
    with pytest.raises(InputError, match=r"found: 2"):
        open_permutations(path)
    for key, text in (("spec", "{"), ("spec", json.dumps({"groups": [{"kind": "x"}], "fixed": []})), ("kind", "zip")):
        drawn().save(path)
        changed(path, **{key: text})
        with pytest.raises(CorruptFile, match="the file of permutations is damaged"):
            open_permutations(path)
    replace(drawn(), models=("a", "b")).save(path)
    with pytest.raises(InputError, match="perms.safetensors: these are not permutations of the spec's groups"):
        open_permutations(path)
