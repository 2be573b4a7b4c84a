"""Specs of vision models: any permutation that they allow keeps the function, and nothing in them can be left out."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch import nn

from pymerge.align import Heads, Permutations, Spec, Units
from pymerge.align.permutations import positions
from pymerge.align.random_permutations import random_permutations
from pymerge.align.specs import floating_shapes, spec_for
from pymerge.errors import InputError
from tests.align.vision import (
    CASES,
    TRANSFORMERS,
    Block,
    InMemory,
    Named,
    ResNet,
    TimmVit,
    Tiny,
    TinyTransformers,
    group_norm,
)
from tests.golden.cases import FOLDER

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
# Without a head: the axis of the output on which the units of its last group lie.
HEADLESS = {"resnet-no-head": 1, "vit-timm-no-head": 2}
HEADLESS_TRANSFORMERS = {"vit-base": 2, "clip-vision-base": 2, "clip-text-base": 2, "resnet-base": 1}
HEADED = [name for name in CASES if name not in HEADLESS]
BOTH = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def spec_of(tiny, **options):
    return spec_for(floating_shapes(tiny.tensors), tiny.case.config, tiny.case.family, **options)


def scrambled(spec, seed=0):
    return random_permutations(spec, ("a", "b"), torch.Generator().manual_seed(seed))


def aligned(tiny, permutations):
    return {name: permutations.aligned(name, tensor, 1) for name, tensor in tiny.tensors.items()}


def change(tiny, permutations):
    """Largest change of an output, relative to the largest output."""
    before, after = tiny.output(tiny.tensors), tiny.output(aligned(tiny, permutations))
    return float((after - before).abs().max() / before.abs().max())


@BOTH
@pytest.mark.parametrize("name", HEADED)
def test_any_allowed_permutation_keeps_the_function(name, dtype):
    tiny = Tiny(name, dtype)
    permutations = scrambled(spec_of(tiny))
    permutations.check()
    assert change(tiny, permutations) < TOLERANCE[dtype]


@BOTH
@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if name not in HEADLESS_TRANSFORMERS])
def test_transformers_models_by_the_names_of_their_checkpoints(name, dtype, tmp_path):
    pytest.importorskip("transformers")
    tiny = TinyTransformers(name, tmp_path, dtype)
    assert change(tiny, scrambled(spec_for(floating_shapes(tiny.tensors), tiny.config))) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", [*HEADLESS, *HEADLESS_TRANSFORMERS])
def test_without_a_head_the_output_is_in_the_anchors_order(name, tmp_path):
    if name in HEADLESS:
        tiny, axis = Tiny(name, torch.float64), HEADLESS[name]
        spec = spec_of(tiny)
    else:
        pytest.importorskip("transformers")
        tiny, axis = TinyTransformers(name, tmp_path, torch.float64), HEADLESS_TRANSFORMERS[name]
        spec = spec_for(floating_shapes(tiny.tensors), tiny.config)
    permutations = scrambled(spec)
    stream = [group.name for group in spec.groups if group.name.startswith("residual")][-1]
    before, after = tiny.output(tiny.tensors), tiny.output(aligned(tiny, permutations))
    moved = before.index_select(axis, permutations.index[stream]["units"][1])
    assert float((after - moved).abs().max() / before.abs().max()) < 1e-12
    assert float((after - before).abs().max() / before.abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["vit", "deit", "clip", "resnet-bottleneck"])
def test_transformers_models_by_the_names_of_their_modules(name, tmp_path):
    pytest.importorskip("transformers")
    tiny = InMemory(name, tmp_path, torch.float64)
    spec = spec_for(floating_shapes(tiny.tensors), tiny.config)
    assert change(tiny, scrambled(spec)) < 1e-12
    every_entry_counts(tiny, spec)


@pytest.mark.parametrize("name", HEADED)
def test_every_entry_counts(name):
    tiny = Tiny(name, torch.float64)
    every_entry_counts(tiny, spec_of(tiny))


def every_entry_counts(tiny, spec):
    permutations = scrambled(spec)
    for group in spec.groups:
        for entry in group.entries:
            if entry.view == "k" and entry.parameter.endswith("bias"):
                continue  # the same for all keys: the softmax drops it
            lacking = replace(group, entries=tuple(other for other in group.entries if other != entry))
            broken = Spec(groups=tuple(lacking if other is group else other for other in spec.groups))
            assert change(tiny, replace(permutations, spec=broken)) > 1e-3, entry


@pytest.mark.parametrize("name", CASES)
def test_taps_see_the_units(name):
    """At each tap the scrambled model shows the model's activations, scrambled alike."""
    tiny = Tiny(name, torch.float64)
    spec = spec_of(tiny)
    permutations = scrambled(spec)
    before = seen(tiny, spec, tiny.tensors)
    after = seen(tiny, spec, aligned(tiny, permutations))
    for group in spec.groups:
        assert group.taps, group.name
        for tap in group.taps:
            index = permutations.index[group.name][tap.view][1]
            assert torch.allclose(after[tap], before[tap][index], rtol=1e-9, atol=1e-12), tap
            assert not torch.allclose(after[tap], before[tap], rtol=1e-3), tap


def seen(tiny, spec, tensors):
    """Tap -> what it sees, [n, samples]."""
    found, hooks = {}, []

    def hook(tap, n):
        def see(_module, inputs, output):
            x = (inputs[0] if tap.side == "input" else output).movedim(tap.axis, 0)
            found[tap] = x[positions(n, tap).flatten()].reshape(n, -1)

        return see

    for group in spec.groups:
        for tap in group.taps:
            module = tiny.model.get_submodule(tap.module)
            hooks.append(module.register_forward_hook(hook(tap, group.views()[tap.view])))
    tiny.output(tensors)
    for handle in hooks:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["resnet-gn", "vgg-gn"])
def test_units_may_not_leave_their_norm_group(name):
    tiny = Tiny(name, torch.float64)
    spec = spec_of(tiny)
    assert any(group.blocks == 4 for group in spec.groups)
    loose = Spec(groups=tuple(replace(group, blocks=1) for group in spec.groups), fixed=spec.fixed)
    assert change(tiny, scrambled(loose)) > 1e-3


def test_channels_of_q_move_with_those_of_k():
    tiny = Tiny("vit-timm", torch.float64)
    permutations = scrambled(spec_of(tiny))
    other = scrambled(spec_of(tiny), seed=1)
    heads = [group.name for group in permutations.spec.groups if isinstance(group, Heads)]
    for view, counterpart in (("q", "k"), ("v", "o")):
        index = {
            name: {**views, **({view: other.index[name][view]} if name in heads else {})}
            for name, views in permutations.index.items()
        }
        assert change(tiny, replace(permutations, index=index)) > 1e-3, counterpart


def test_inputs_of_a_grouped_convolution_stay_in_their_block():
    tiny = Tiny("resnext", torch.float64)
    spec = spec_of(tiny)
    loose = tuple(replace(group, rotary=0) if isinstance(group, Heads) else group for group in spec.groups)
    assert change(tiny, scrambled(Spec(groups=loose, fixed=spec.fixed))) > 1e-3


def test_untied_heads_are_the_released_form_and_change_the_function():
    tiny = Tiny("vit-timm", torch.float64)
    spec = spec_of(tiny, tie_heads=False)
    blocks = {group.name: group.blocks for group in spec.groups if isinstance(group, Units)}
    assert {name: count for name, count in blocks.items() if not name.startswith("blocks.1")} == {
        "residual": 1,
        "blocks.0.attn.qk": 4,
        "blocks.0.attn.v": 4,
        "blocks.0.mlp": 1,
    }
    assert taps(spec.group("blocks.0.attn.qk")) == {("attn.qkv", "output", (0, 3)), ("attn.qkv", "output", (1, 3))}
    assert taps(spec.group("blocks.0.attn.v")) == {("attn.proj", "input", (0, 1))}
    permutations = scrambled(spec)
    assert change(tiny, permutations) > 1e-3
    index = dict(permutations.index)
    for layer in ("blocks.0.attn", "blocks.1.attn"):
        index[f"{layer}.v"] = index[f"{layer}.qk"]
    assert change(tiny, Permutations(spec=spec, index=index, models=("a", "b"))) < 1e-12


def taps(group):
    return {(tap.module.removeprefix("blocks.0."), tap.side, tap.part) for tap in group.taps}


def test_groups_do_not_depend_on_the_order_of_names():
    tiny = Tiny("vit-timm", torch.float32)
    shapes = floating_shapes(tiny.tensors)
    backwards = dict(reversed(shapes.items()))
    assert spec_for(backwards, tiny.case.config, "vit") == spec_of(tiny)


def test_statistics_are_permuted_but_not_compared():
    spec = spec_of(Tiny("resnet-bn", torch.float32))
    entries = [entry for group in spec.groups for entry in group.entries]
    running = [entry for entry in entries if "running" in entry.parameter]
    assert running and not any(entry.similarity for entry in running)
    assert all(entry.similarity for entry in entries if entry not in running)


def test_check_finds_what_the_groups_do_not_cover():
    tiny = Tiny("vit-timm", torch.float32)
    spec, shapes = spec_of(tiny), floating_shapes(tiny.tensors)
    lacking = replace(
        spec,
        groups=tuple(
            replace(group, entries=tuple(e for e in group.entries if e.parameter != "blocks.1.norm1.bias"))
            for group in spec.groups
        ),
    )
    with pytest.raises(InputError, match=r"blocks\.1\.norm1\.bias \[32\]: in no group and not listed as fixed"):
        lacking.check(shapes)
    with pytest.raises(InputError, match=r"adapter\.weight \[3, 32\]: in no group"):
        spec_for(shapes | {"adapter.weight": (3, 32)}, tiny.case.config, "vit")
    with pytest.raises(InputError, match=r"blocks\.0\.mlp\.fc2\.weight .* axis 1 has 60 entries, .* needs 64"):
        spec_for(shapes | {"blocks.0.mlp.fc2.weight": (32, 60)}, tiny.case.config, "vit")


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.layer1 = nn.Sequential(Block(8, [(3, 8), (3, 8)], 1, nn.BatchNorm2d, 1, "downsample"))
        self.fc = nn.Linear(8, 2)


def widened_without_parameters():
    model = ResNet()
    model.layer2[0].downsample = nn.Sequential()  # type: ignore[index]
    return model


def grouped_twice():
    convolutions = ((3, 8, 1), (8, 8, 4), (8, 8, 4), (8, 4, 1))
    return {f"conv{i}": nn.Conv2d(a, b, 3, groups=groups) for i, (a, b, groups) in enumerate(convolutions)}


REFUSED = {
    "head count": (TimmVit, "vit", {}, "num_attention_heads"),
    "norm groups": (lambda: ResNet(norm=group_norm), "resnet", {}, "num_groups"),
    "other norm groups": (
        lambda: ResNet(norm=group_norm, bottleneck=True, groups=2),
        "resnet",
        {"num_groups": 4},
        "groups",
    ),
    "rotary": (TimmVit, "vit", {"num_heads": 4, "architecture": "vit_tiny_rope"}, "rotate"),
    "pre-activation": (PreActivation, "resnet", {}, "pre-activation"),
    "padded shortcut": (widened_without_parameters, "resnet", {}, r"axis 0 has 16 entries, group residual\.0 needs 8"),
    "grouped at the end": (
        lambda: Named(conv1=nn.Conv2d(3, 8, 3), conv2=nn.Conv2d(8, 8, 3, groups=4)),
        "chain",
        {},
        "a group only between",
    ),
    "grouped at the start": (lambda: ResNet(groups=2), "resnet", {}, "a group only between"),
    "two grouped": (lambda: Named(**grouped_twice()), "chain", {}, "a group only between"),
    "not a ResNet": (TimmVit, "resnet", {}, "not a ResNet"),
    "order": (lambda: Named(stem=nn.Linear(4, 4), body=nn.Linear(4, 4)), "chain", {}, "comes first"),
    "norm's layer": (lambda: Named(fc1=nn.Linear(4, 4), norm=nn.LayerNorm(4)), "chain", {}, "does norm follow"),
    "widths": (lambda: Named(fc1=nn.Linear(4, 6), fc2=nn.Linear(4, 2)), "chain", {}, "no multiple of the 6 units"),
    "layers": (lambda: Named(fc1=nn.Linear(4, 6)), "chain", {"layers": ["fc2"]}, "are not the modules with weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_spec_cannot_say_is_refused(case):
    make, family, config, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        spec_for(floating_shapes(make().state_dict()), config, family)


def test_the_order_of_a_chain_can_be_given():
    torch.manual_seed(0)
    model = Named(stem=nn.Linear(8, 8), norm=nn.LayerNorm(8), body=nn.Linear(8, 8), head=nn.Linear(8, 3)).double()
    config = {"layers": ["stem", "norm", "body", "head"]}
    state, x = model.state_dict(), torch.randn(5, 8).double()
    permutations = scrambled(spec_for(floating_shapes(state), config, "chain"))
    before = model(x)
    model.load_state_dict({name: permutations.aligned(name, tensor, 1) for name, tensor in state.items()})
    assert [group.name for group in permutations.spec.groups] == ["stem", "body"]
    assert torch.allclose(model(x), before, rtol=1e-12)


GOLDEN = {  # file -> family, config
    "case08_mlp_permute_a050": ("chain", {}),
    "case13_vit_permute_a050": ("vit", {"num_heads": 4}),
    "case17_resnet_bn_permute_a050": ("resnet", {}),
    "case18_resnet_gn_permute_a050": ("resnet", {"num_groups": 4}),
}


def released_entry(entry):
    """As ours; q, k and v are cut apart there before anyone looks at their columns."""
    part = tuple(entry.get("chunk", (0, 1))) if entry["role"] == "out" else (0, 1)
    return entry["param"], entry["axis"], entry["role"], part, entry.get("similarity") != "ignored"


@pytest.mark.parametrize("case", GOLDEN)
def test_groups_are_the_released_ones(case):
    path = FOLDER / "mudsc" / f"{case}.safetensors"
    if not path.exists():
        pytest.skip("no golden files: set PYMERGE_GOLDEN_DIR")
    with safe_open(path, "pt") as file:
        released = json.loads(file.metadata()["spec"])
        names = [name for name in file.keys() if name.startswith("task0/")]
        shapes = {name.removeprefix("task0/"): tuple(file.get_slice(name).get_shape()) for name in names}
    family, config = GOLDEN[case]
    ours = {
        (frozenset((e.parameter, e.axis, e.role, e.part, e.similarity) for e in group.entries), group.blocks)
        for group in spec_for(shapes, config, family, tie_heads=False).groups
    }
    assert ours == {(frozenset(map(released_entry, group["entries"])), group["blocks"]) for group in released}
