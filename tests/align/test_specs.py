"""Specs preserve the function, and no entry of them can be left out."""

from dataclasses import replace

import pytest
import torch

from pymerge.align.groups import Heads, Spec
from pymerge.align.permutations import Permutations, identity
from pymerge.align.random_permutations import in_blocks
from pymerge.align.specs import spec_for
from pymerge.errors import InputError
from tests.align.tiny import MODELS, Tiny, all_in_float64, scrambled

pytest.importorskip("transformers")
BASE_MODELS = ("bert-base", "llama-base")  # their output is the residual stream itself


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Models of float32 by name, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = Tiny(MODELS[name], tmp_path_factory.mktemp(name), torch.float32)
        return made[name]

    return get


@pytest.mark.parametrize("name", [name for name in MODELS if name not in BASE_MODELS])
def test_any_allowed_permutation_preserves_the_function(name, tiny, tmp_path):
    model = tiny(name)
    permutations = scrambled(spec_for(model.shapes, model.config))
    permutations.check()
    assert model.change(permutations) < 1e-5
    with all_in_float64():
        assert Tiny(MODELS[name], tmp_path, torch.float64).change(permutations) < 1e-12


def without(spec: Spec, place: int) -> tuple[Spec, str]:
    """The spec less one entry, counted over all groups; the entry."""
    for i, group in enumerate(spec.groups):
        if place < len(group.entries):
            left = (*group.entries[:place], *group.entries[place + 1 :])
            groups = (*spec.groups[:i], replace(group, entries=left), *spec.groups[i + 1 :])
            entry = group.entries[place]
            return replace(spec, groups=groups), f"{entry.parameter} {entry.axis} {entry.view}"
        place -= len(group.entries)
    raise IndexError(place)


# Softmax does not see what a bias of k adds to all scores of a query, unless positions rotate it.
UNSEEN = {
    "bert": ["bert.encoder.layer.0.attention.self.key.bias 0 k"],
    "bert-classifier": ["bert.encoder.layer.0.attention.self.key.bias 0 k"],
    "bert-untied": ["bert.encoder.layer.0.attention.self.key.bias 0 k"],
    "roberta": ["roberta.encoder.layer.0.attention.self.key.bias 0 k"],
    "gpt2": ["transformer.h.0.attn.c_attn.bias 0 k"],
    "opt": ["model.decoder.layers.0.self_attn.k_proj.bias 0 k"],
    "gpt_neox": [],
    "mixtral": [],
    "olmo2": [],
    "qwen3": [],
}


@pytest.mark.parametrize("name", UNSEEN)
def test_no_entry_can_be_left_out(name, tiny):
    model = tiny(name)
    spec = spec_for(model.shapes, model.config)
    permutations = scrambled(spec)
    unseen = []
    for place in range(sum(len(group.entries) for group in spec.groups)):
        less, entry = without(spec, place)
        if ".1." not in entry and model.change(replace(permutations, spec=less)) < 1e-3:
            unseen.append(entry)
    assert unseen == UNSEEN[name]


def with_heads(permutations: Permutations, **views: torch.Tensor) -> Permutations:
    """The permutations with other index vectors of model 1 in the first group of heads."""
    group = next(group for group in permutations.spec.groups if isinstance(group, Heads))
    index = {
        view: torch.stack([rows[0], views.get(view, rows[1])]) for view, rows in permutations.index[group.name].items()
    }
    return replace(permutations, index=dict(permutations.index) | {group.name: index})


def refused(permutations: Permutations, message: str) -> Permutations:
    with pytest.raises(InputError, match=message):
        permutations.check()
    return permutations


def check_swap(model, swapped: Permutations, message: str | None) -> None:
    """Refused with this message, and with a reason; None: allowed, and the function stays."""
    if message:
        assert model.change(refused(swapped, message)) > 1e-2
    else:
        swapped.check()
        assert model.change(swapped) < 1e-5


def test_channels_under_rotary_positions_may_not_move(tiny):
    """Even whole pairs of them, alike in q and k."""
    model = tiny("llama")
    permutations = identity(spec_for(model.shapes, model.config), ("a", "b"))
    swap = torch.tensor([1, 0, 2, 3, 5, 4, 6, 7])  # pairs (0, 4) and (1, 5) of a head of 8
    q, k = (torch.arange(n).view(-1, 8)[:, swap].flatten() for n in (32, 16))
    assert model.change(refused(with_heads(permutations, q=q, k=k), "one of the first 8 channels moves")) > 1e-2
    model = tiny("gpt_neox")  # half of each head is rotated
    permutations = identity(spec_for(model.shapes, model.config), ("a", "b"))
    for first, message in ((0, "one of the first 4 channels moves"), (4, None)):
        swap = torch.arange(8)
        swap[first : first + 4] = swap[first : first + 4].flip(0)
        q = torch.arange(32).view(-1, 8)[:, swap].flatten()
        check_swap(model, with_heads(permutations, q=q, k=q), message)


def test_query_heads_may_not_leave_their_key_value_head(tiny):
    model = tiny("llama")
    permutations = identity(spec_for(model.shapes, model.config), ("a", "b"))
    for order, message in (([1, 0, 3, 2], None), ([0, 2, 1, 3], "leave their key-value head")):
        heads = torch.arange(32).view(4, 8)[torch.tensor(order)].flatten()
        check_swap(model, with_heads(permutations, q=heads, o=heads), message)


def test_released_form_orders_heads_of_qk_and_v_apart(tiny):
    """It preserves the function only where the two orders agree."""
    model = tiny("bert")
    spec = spec_for(model.shapes, model.config, tie_heads=False)
    assert not any(isinstance(group, Heads) for group in spec.groups)
    at = "bert.encoder.layer.0.attention"
    qk, v = spec.group(f"{at}.qk"), spec.group(f"{at}.v")
    assert (qk.blocks, qk.size, len(qk.entries), len(qk.taps)) == (4, 32, 4, 2)
    assert (v.blocks, v.size, len(v.entries), [tap.module for tap in v.taps]) == (4, 32, 3, [f"{at}.output.dense"])
    permutations = scrambled(spec)
    permutations.check()
    assert model.change(permutations) > 1e-3
    heads = {f"bert.encoder.layer.{i}.attention.{part}" for i in range(2) for part in ("qk", "v")}
    order = torch.tensor([2, 0, 3, 1])
    within = {name: rows[1].view(4, 8) % 8 for name in heads for rows in permutations.index[name].values()}
    same = {name: {"units": torch.stack([torch.arange(32), in_blocks(order, within[name])])} for name in heads}
    assert model.change(replace(permutations, index=dict(permutations.index) | same)) < 1e-5
    with pytest.raises(InputError, match="rotary positions do not allow"):
        spec_for(tiny("llama").shapes, tiny("llama").config, tie_heads=False)


@pytest.mark.parametrize("name", BASE_MODELS)
def test_a_model_without_a_head_gives_its_outputs_in_the_anchors_order(name, tiny):
    model = tiny(name)
    permutations = scrambled(spec_for(model.shapes, model.config))
    before, after = (model.output(t)[: 3 * 9 * 32].view(-1, 32) for t in (model.tensors, model.aligned(permutations)))
    index = permutations.index["residual"]["units"][1]
    assert (after - before[:, index]).abs().max() < 1e-5 * before.abs().max()


def test_experts_move_by_name(tiny):
    model = tiny("mixtral")
    spec = spec_for(model.shapes, model.config)
    permutations = identity(spec, ("a", "b"))
    at = "model.layers.0.block_sparse_moe"
    order = torch.tensor([[0, 1, 2, 3], [2, 0, 3, 1]])
    moved = replace(permutations, index=dict(permutations.index) | {f"{at}.experts": {"units": order}})
    assert moved.source(f"{at}.experts.0.w2.weight", 1) == f"{at}.experts.2.w2.weight"
    assert moved.source(f"{at}.gate.weight", 1) == f"{at}.gate.weight"
    assert model.change(moved) < 1e-5
    nameless = replace(
        spec, groups=tuple(replace(g, members=()) if g.name == f"{at}.experts" else g for g in spec.groups)
    )
    assert model.change(replace(moved, spec=nameless)) > 1e-2


def test_taps_see_the_units_of_every_group_that_common_samples_reach(tiny):
    for name in ("llama", "gpt2", "gpt_neox", "bert", "opt", "mixtral"):
        model = tiny(name)
        for group in spec_for(model.shapes, model.config).groups:
            views = sorted(tap.view for tap in group.taps)
            expected = ["k", "o", "q"] if isinstance(group, Heads) else ["units"]
            assert views == ([] if "experts" in group.name else expected), group.name
            assert all(f"{tap.module}.weight" in model.shapes for tap in group.taps)


def test_a_tied_head_counts_once(tiny):
    model = tiny("llama-tied")
    stored_twice = model.shapes | {"lm_head.weight": model.shapes["model.embed_tokens.weight"]}
    (entry,) = [e for e in spec_for(stored_twice, model.config).group("residual").entries if "lm_head" in e.parameter]
    assert not entry.similarity
    untied = spec_for(stored_twice, model.config | {"tie_word_embeddings": False})
    assert all(e.similarity for e in untied.group("residual").entries)


def test_what_cannot_be_placed_is_listed(tiny):
    model = tiny("llama")
    odd = model.shapes | {"model.layers.0.self_attn.sinks": (4,), "model.layers.1.mlp.mixer.weight": (32, 32)}
    with pytest.raises(InputError) as error:
        spec_for(odd, model.config | {"model_type": "new"}, "decoder")
    assert "model.layers.0.self_attn.sinks [4]: in no group" in str(error.value)
    assert "model.layers.1.mlp.mixer.weight [32, 32]: in no group" in str(error.value)
    with pytest.raises(InputError, match=r"no permutation groups for 'lama'; did you mean 'llama'\?"):
        spec_for(model.shapes, {"model_type": "lama"})
    with pytest.raises(InputError, match="needs? num_attention_heads"):
        spec_for(model.shapes, {"model_type": "llama"})
    with pytest.raises(InputError, match="config.json has no model_type"):
        spec_for(model.shapes)
    with pytest.raises(InputError, match="axis 0 has 32 entries, group"):
        spec_for(model.shapes, model.config | {"num_attention_heads": 5})
    with pytest.raises(InputError, match="ALiBi"):
        spec_for(model.shapes, model.config | {"alibi": True})
    with pytest.raises(InputError, match="groups of experts"):
        spec_for(model.shapes, model.config | {"n_group": 8})


def test_fused_experts_are_refused(tiny):
    model = tiny("mixtral")
    stored = {name: shape for name, shape in model.shapes.items() if ".experts." not in name}
    fused = stored | {f"model.layers.{i}.block_sparse_moe.experts.down_proj": (4, 32, 48) for i in range(2)}
    with pytest.raises(InputError, match="experts are not stored one by one"):
        spec_for(fused, model.config)
