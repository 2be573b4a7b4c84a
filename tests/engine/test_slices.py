"""Slices and modules on disk: values by formulas written out here, names, config.json, what is refused, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.engine.adapter_out import merge_to_adapter
from pymerge.engine.local import merge_to_disk, plan_merge
from pymerge.engine.memory import merge_in_memory
from pymerge.engine.plan import Options
from pymerge.engine.scaled import why_merged_anew
from pymerge.engine.verify import verify
from pymerge.errors import InputError, MergeError, MissingTensor, OutputError, RecipeError, ShapeMismatch
from pymerge.recipe import Recipe
from tests.adapters import adapted, random_factors, write_adapter
from tests.models import interrupted_after, random_tensors, read_model, same, write_model

LAYER = {"attn.weight": (24, 24), "mlp.weight": (40, 24), "norm.weight": (24,)}
OUTER = {"model.embed_tokens.weight": (48, 24), "model.norm.weight": (24,), "lm_head.weight": (48, 24)}
Model = dict[str, Tensor]


def decoder(seed: int, layers: int = 4, prefix: str = "model.layers") -> Model:
    inner = {f"{prefix}.{i}.{name}": shape for i in range(layers) for name, shape in LAYER.items()}
    return random_tensors(seed, OUTER | inner)


def config(layers: int = 4, **more: Any) -> dict[str, Any]:
    return {"model_type": "test", "num_hidden_layers": layers, "tie_word_embeddings": False} | more


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Model]:
    """Three models of 4, 6 and 4 layers, in folders a, b and c."""
    found = {name: decoder(seed, layers) for seed, (name, layers) in enumerate({"a": 4, "b": 6, "c": 4}.items())}
    for name, tensors in found.items():
        layers = 6 if name == "b" else 4
        write_model(tmp_path / name, tensors, config(layers, layer_types=[f"{name}{i}" for i in range(layers)]))
    return found


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def source(model: str, *layers: int, **parameters: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"model": model}
    found |= {"layer_range": list(layers)} if layers else {}
    return found | ({"parameters": parameters} if parameters else {})


def slices(*parts: Any, method: str = "passthrough", **keys: Any) -> dict[str, Any]:
    """A recipe: each part is a slice, or the list of its sources."""
    listed = [part if isinstance(part, dict) else {"sources": part} for part in parts]
    return {"merge_method": method, "slices": listed} | keys


def merged(raw: dict[str, Any], out: str = "out", **options: Any) -> Model:
    merge_to_disk(Recipe.from_dict(raw), out, Options(**options))
    return read_model(Path(out))


def refused(raw: dict[str, Any], kind: type[MergeError] = RecipeError) -> str:
    with pytest.raises(kind) as found:
        plan_merge(Recipe.from_dict(raw))
    return str(found.value)


def franken(*parts: tuple[Model, int]) -> Model:
    """The layers given one after the other; what comes before them from the first, what is behind from the last."""
    out = {"model.embed_tokens.weight": parts[0][0]["model.embed_tokens.weight"]}
    out |= {name: parts[-1][0][name] for name in ("model.norm.weight", "lm_head.weight")}
    for i, (model, layer) in enumerate(parts):
        out |= {f"model.layers.{i}.{name}": model[f"model.layers.{layer}.{name}"] for name in LAYER}
    return out


FRANKEN = slices([source("a", 0, 3)], [source("b", 1, 3)], [source("a", 1, 4)])


def test_layers_of_two_models_one_behind_the_other(models: dict[str, Model]) -> None:
    a, b = models["a"], models["b"]
    layers = [(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (a, 1), (a, 2), (a, 3)]
    assert same(merged(FRANKEN), franken(*layers))
    said = json.loads(Path("out/config.json").read_text())
    assert said["num_hidden_layers"] == 8
    assert said["layer_types"] == ["a0", "a1", "a2", "b1", "b2", "a1", "a2", "a3"]
    assert verify("out")["tensors"] == 3 + 8 * len(LAYER)
    summary = json.loads(Path("out/merge.json").read_text())
    assert summary["recipe"] == Recipe.from_dict(FRANKEN).to_dict()
    assert "model.layers: 8 layers: a[0, 3], b[1, 3], a[1, 4]" in summary["notes"]
    assert Path("out/README.md").read_text().startswith('---\nbase_model:\n- "a"\n- "b"\n')


def test_ends_from_the_first_and_the_last_slice(models: dict[str, Model]) -> None:
    a, b = models["a"], models["b"]
    assert same(merged(slices([source("b", 0, 2)], [source("a", 3, 4)])), franken((b, 0), (b, 1), (a, 3)))


def test_all_layers_where_no_range_is_given(models: dict[str, Model]) -> None:
    found = merged(slices([source("b")]))
    assert same(found, models["b"]) and json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == 6


def test_scale_by_level_name_and_depth(models: dict[str, Model]) -> None:
    """Filters of a source see the model's names, and t runs over the layers of the slice."""
    own = [{"filter": "layers.2.attn", "value": 0}, {"filter": "mlp", "value": [1, 2, 3]}]
    raw = slices([source("a", 0, 1)], {"sources": [source("b", 1, 4, scale=own)], "parameters": {"scale": 5}})
    found, b = merged(raw | {"parameters": {"scale": 7}}), models["b"]
    assert torch.equal(found["model.layers.0.mlp.weight"], 7 * models["a"]["model.layers.0.mlp.weight"])
    for i, (mlp, attn) in enumerate([(1, 5), (2, 0), (3, 5)]):
        assert torch.equal(found[f"model.layers.{i + 1}.mlp.weight"], mlp * b[f"model.layers.{i + 1}.mlp.weight"])
        assert torch.equal(found[f"model.layers.{i + 1}.attn.weight"], attn * b[f"model.layers.{i + 1}.attn.weight"])
    assert torch.equal(found["lm_head.weight"], 5 * b["lm_head.weight"])


def test_linear_of_different_layers(models: dict[str, Model]) -> None:
    a, b, c = (models[name] for name in "abc")
    first = [source("a", 0, 2, weight=[0, 1]), source("b", 4, 6)]
    second = {"sources": [source("c", 1, 2), source("a", 0, 1)], "parameters": {"weight": [3, 9]}}
    found = merged(slices(first, second, method="linear", parameters={"weight": 2}))
    wanted: Model = {}
    for name in LAYER:
        at = f"model.layers.{{}}.{name}"
        wanted[at.format(0)] = b[at.format(4)]
        wanted[at.format(1)] = (a[at.format(1)] + 2 * b[at.format(5)]) / 3
        wanted[at.format(2)] = (c[at.format(1)] + a[at.format(0)]) / 2
    wanted["model.embed_tokens.weight"] = b["model.embed_tokens.weight"]
    wanted |= {name: (c[name] + a[name]) / 2 for name in ("model.norm.weight", "lm_head.weight")}
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_slice_with_a_base_of_its_own_and_depth_of_the_output(models: dict[str, Model]) -> None:
    a, b, c = (models[name] for name in "abc")
    parts = [
        {"sources": [source("a", 0, 2), source("b", 2, 4)], "base_model": "b"},
        [source("a", 2, 4), source("c", 0, 2)],
    ]
    keys: dict[str, Any] = {
        "base_model": "a",
        "parameters": {"weight": 0.5},
        "calibrate": {"method": "lines", "a": 0.1},
    }
    found = merged(slices(*parts, method="task_arithmetic") | keys)
    for i in range(4):
        base, model, at, other = (b, a, 2 + i, i) if i < 2 else (a, c, i, i - 2)
        factor = 0.5 * (0.1 + 0.9 * i / 3)
        for name in LAYER:
            start, end = base[f"model.layers.{at}.{name}"], model[f"model.layers.{other}.{name}"]
            torch.testing.assert_close(
                found[f"model.layers.{i}.{name}"], start + factor * (end - start), rtol=1e-6, atol=1e-6
            )


def test_slerp_gradient_starts_again_in_each_slice(models: dict[str, Model]) -> None:
    raw = slices([source("a", 0, 3), source("b", 0, 3)], [source("a", 3, 4), source("b", 5, 6)], method="slerp")
    found = merged(raw | {"base_model": "a", "parameters": {"t": [0, 1]}})
    a, b = models["a"], models["b"]
    for name in LAYER:
        assert torch.equal(found[f"model.layers.0.{name}"], a[f"model.layers.0.{name}"])
        assert torch.equal(found[f"model.layers.2.{name}"], b[f"model.layers.2.{name}"])
        assert torch.equal(found[f"model.layers.3.{name}"], b[f"model.layers.5.{name}"])
    assert torch.equal(found["lm_head.weight"], a["lm_head.weight"])


def test_interrupted_and_continued(models: dict[str, Model]) -> None:
    wanted = merged(FRANKEN)
    with interrupted_after(5):
        merged(FRANKEN, "again")
    with pytest.raises(OutputError):
        merged(slices([source("a", 0, 3)], [source("b", 1, 3)], [source("a", 0, 3)]), "again")
    assert same(merged(FRANKEN, "again"), wanted)


def test_files_are_read_from_begin_to_end(models: dict[str, Model]) -> None:
    read = [item.entry.reference for item in plan_merge(Recipe.from_dict(FRANKEN)).items]
    for name in "ab":
        offsets = [tensor.offset for tensor in read if str(tensor.file).startswith(f"{name}/")]
        assert offsets == sorted(offsets) and len(offsets) > 3
    files = [tensor.file for tensor in read]
    assert len({file for file in files}) == 1 + sum(a != b for a, b in zip(files, files[1:], strict=False))


def test_in_memory(models: dict[str, Model]) -> None:
    parts = [{"sources": [source(models["a"], 0, 3)]}, {"sources": [source(models["b"], 5, 6)]}]  # type: ignore[arg-type]
    found = merge_in_memory(Recipe.from_kwargs(None, [], "passthrough", slices=parts))
    a, b = models["a"], models["b"]
    assert same(found, franken((a, 0), (a, 1), (a, 2), (b, 5)))


def test_adapters_give_layers_too(models: dict[str, Model]) -> None:
    shapes = {f"model.layers.{i}.{name}": LAYER[name] for i in range(4) for name in ("attn.weight", "mlp.weight")}
    factors = random_factors(5, shapes)
    write_adapter(Path("lora"), factors, Path("a"))
    whole = {name: tensor.float() for name, tensor in adapted(models["a"], factors).items()}
    found = merged(slices([source("a", 0, 2)], [source("a+lora", 1, 4)]))
    wanted = franken((models["a"], 0), (models["a"], 1), (whole, 1), (whole, 2), (whole, 3))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    raw = slices([source("a", 1, 3), source("a+lora", 1, 3)], method="task_arithmetic", base_model="a")
    found = merged(raw | {"parameters": {"weight": 2}}, "factored")
    for i in range(2):
        base, tuned = (m[f"model.layers.{i + 1}.mlp.weight"] for m in (models["a"], whole))
        torch.testing.assert_close(found[f"model.layers.{i}.mlp.weight"], 2 * tuned - base, rtol=1e-5, atol=1e-5)


def test_tied_heads() -> None:
    a, b = decoder(1), decoder(2)
    del b["lm_head.weight"]
    write_model(Path("a"), a, config())
    write_model(Path("b"), b, config(tie_word_embeddings=True))
    found = merged(slices([source("a", 0, 2)], [source("b", 0, 2)]))
    assert torch.equal(found["lm_head.weight"], b["model.embed_tokens.weight"])
    found = merged(slices([source("b", 0, 2)], [source("b", 1, 3)]), "tied")
    assert "lm_head.weight" not in found
    assert "a head of its own in a" in refused(slices([source("b", 0, 2)], [source("a", 0, 2)]), InputError)


def test_lists_of_layers_numbers_follow() -> None:
    for name in "ab":
        write_model(
            Path(name), decoder(1), config(mlp_only_layers=[0, 3] if name == "a" else [1], eos_token_id=[1, 2, 3, 4])
        )
    merged(slices([source("a", 2, 4)], [source("b", 0, 2)], [source("a", 0, 1)]))
    said = json.loads(Path("out/config.json").read_text())
    assert said["mlp_only_layers"] == [1, 3, 4] and said["eos_token_id"] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("raw", "kind", "message"),
    [
        (
            slices([source("a", 0, 2)], [source("a", 2, 5)]),
            RecipeError,
            r"slices[1]: a has 4 layers called model.layers",
        ),
        (
            slices([source("a", 0, 2), source("b", 0, 3)], method="linear", parameters={"weight": 1}),
            RecipeError,
            "slices[0]: the sources must give equally many layers: a 2, b 3",
        ),
        (slices([source("a", 0, 2)], [source("odd", 0, 2)]), ShapeMismatch, "from odd[0, 2], is no such layer"),
        (slices([source("a", 0, 2)], [source("wide", 0, 2)]), ShapeMismatch, "lm_head.weight: [50, 24] in wide[0, 2]"),
        (slices([source("more", 0, 2)], [source("a", 0, 2)]), RecipeError, "model.memory of more: its name does not"),
        (slices([source("a", 0, 2)], [source("more", 0, 2)], exclude="*memory"), MissingTensor, "never"),
        (slices([source("stages")]), RecipeError, "has enc.layers (2 layers), model.layers (4 layers): give slices"),
        (slices([source("mute", 0, 2)]), InputError, "mute: config.json does not say how many layers model.layers has"),
        (
            slices(
                [source("a", 0, 2), source("c", 0, 2)],
                method="ties",
                base_model="a",
                style="authors",
                parameters={"scope": "global"},
            ),
            RecipeError,
            "ties asks the whole model before it merges",
        ),
    ],
)
def test_refused_before_anything_is_read(
    raw: dict[str, Any], kind: type[MergeError], message: str, models: dict[str, Model]
) -> None:
    a = models["a"]
    write_model(Path("odd"), {n: torch.ones(41, 24) if "mlp" in n else t for n, t in a.items()}, config())
    write_model(Path("wide"), a | {"lm_head.weight": torch.ones(50, 24)}, config())
    write_model(Path("more"), a | {"model.memory": torch.ones(3)}, config())
    write_model(Path("stages"), a | {f"enc.layers.{i}.weight": torch.ones(3) for i in range(2)}, config())
    write_model(Path("mute"), a, {"model_type": "test"})
    if message == "never":  # what is excluded is the first slice's, and that does not have it
        assert plan_merge(Recipe.from_dict(raw)).counts == {"merged": 15, "copied": 0}
    else:
        assert message in refused(raw, kind)


def test_not_as_an_adapter_and_merged_anew_in_a_search(models: dict[str, Model]) -> None:
    with pytest.raises(RecipeError, match="not as an adapter"):
        merge_to_adapter(Recipe.from_dict(FRANKEN), "out", 4)
    raw = slices([source("a", 0, 2), source("c", 0, 2)], method="task_arithmetic", base_model="a")
    assert why_merged_anew(Recipe.from_dict(raw | {"parameters": {"weight": 1}})) == "it has slices or modules"


def test_layers_that_predict_ahead_are_no_layers_of_the_stack() -> None:
    """DeepSeek-V3 stores them as model.layers.N, where N is the number of layers that run."""
    ahead = {"model.layers.2.eh_proj.weight": (24, 48), "model.layers.2.attn.weight": (24, 24)}
    for seed, name in enumerate("xy"):
        tensors = decoder(seed, 2) | random_tensors(seed + 5, ahead)
        write_model(Path(name), tensors, config(2, num_nextn_predict_layers=1))
    x, y = decoder(0, 2), decoder(1, 2)
    assert same(merged(slices([source("x")], [source("y")])), franken((x, 0), (x, 1), (y, 0), (y, 1)))
    written = json.loads(Path("out/config.json").read_text())
    assert written["num_hidden_layers"] == 4 and written["num_nextn_predict_layers"] == 0
    verify("out")
    assert "x has 2 layers" in refused(slices([source("x", 0, 3)]))
    write_model(Path("z"), y | random_tensors(9, {"model.layers.0.more.weight": (8, 8)}), config(2))
    text = refused(slices([source("x")], [source("z", 0, 1)]), ShapeMismatch)
    assert "model.layers.2 of the output, from z[0, 1], is no such layer" in text and "more.weight" in text


@pytest.fixture
def coders() -> dict[str, Model]:
    """Two encoder-decoders: 2 layers of one, 3 of the other; their first decoder layer has a tensor more."""
    shapes = {"shared.weight": (48, 24), "lm_head.weight": (48, 24)}
    for name, layers in {"encoder": 2, "decoder": 3}.items():
        shapes |= {f"{name}.block.{i}.{at}": shape for i in range(layers) for at, shape in LAYER.items()}
        shapes |= {f"{name}.final_layer_norm.weight": (24,)}
    shapes["decoder.block.0.bias.weight"] = (8, 4)
    found = {name: random_tensors(seed, shapes) for seed, name in enumerate("ab")}
    said = {"model_type": "t5", "num_layers": 2, "num_decoder_layers": 3, "tie_word_embeddings": False}
    for name, tensors in found.items():
        write_model(Path(name), tensors, said)
    return found


def modules(method: str = "linear", **named: Any) -> dict[str, Any]:
    return {"merge_method": method, "modules": named, "parameters": {"weight": 1}}


def test_modules(coders: dict[str, Model]) -> None:
    a, b = coders["a"], coders["b"]
    whole = {"models": [source("a", weight=[0, 1]), source("b", weight=[1, 0])]}
    taken = [{"sources": [source("a", 0, 2), source("b", 0, 2)]}, {"sources": [source("b", 1, 3)]}]
    raw = modules(encoder=whole, decoder={"slices": taken, "parameters": {"weight": [1, 3]}}, shared=whole)
    found = merged(raw)
    for name in LAYER:
        assert torch.equal(found[f"encoder.block.0.{name}"], b[f"encoder.block.0.{name}"])
        assert torch.equal(found[f"encoder.block.1.{name}"], a[f"encoder.block.1.{name}"])
        first, second = (m[f"decoder.block.1.{name}"] for m in (a, b))
        torch.testing.assert_close(found[f"decoder.block.1.{name}"], (first + second) / 2)
        torch.testing.assert_close(found[f"decoder.block.3.{name}"], b[f"decoder.block.2.{name}"])
    assert torch.equal(found["shared.weight"], b["shared.weight"])
    torch.testing.assert_close(found["decoder.final_layer_norm.weight"], b["decoder.final_layer_norm.weight"])
    said = json.loads(Path("out/config.json").read_text())
    assert (said["num_layers"], said["num_decoder_layers"]) == (2, 4)


def test_modules_that_are_not_named(coders: dict[str, Model]) -> None:
    whole = {"models": [source("a"), source("b")]}
    raw = modules(encoder=whole)
    assert "modules: decoder, shared: not named: name them too, or give base_model" in refused(raw)
    assert "encodr: a has not all of these, it has" in refused(modules(encodr=whole))
    found = merged(raw | {"base_model": "a"})
    assert torch.equal(found["decoder.block.2.mlp.weight"], coders["a"]["decoder.block.2.mlp.weight"])
    name = "encoder.block.1.mlp.weight"
    torch.testing.assert_close(found[name], (coders["a"][name] + coders["b"][name]) / 2)
    assert "slices are of one stack of layers, a has decoder.block (3 layers), encoder.block (2 layers)" in refused(
        slices([source("a", 0, 2)])
    )


def test_layers_that_config_cannot_describe(coders: dict[str, Model]) -> None:
    """The first layer has what no other has, and nothing in config.json would say so."""
    rest = {"models": [source("a")]}
    shifted = {"slices": [{"sources": [source("a", 1, 3)]}]}
    raw = {"merge_method": "passthrough", "modules": {"encoder": rest, "decoder": shifted, "shared": rest}}
    assert "decoder.block.0 of the output, from a[1, 3], is no such layer" in refused(raw, ShapeMismatch)
