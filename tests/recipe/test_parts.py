from __future__ import annotations

from typing import Any

import pytest

from pymerge.errors import RecipeError
from pymerge.recipe import Recipe
from pymerge.recipe.stacks import comes_before, kinds_of, modules_of, stacks_of

FRANKEN: dict[str, Any] = {
    "slices": [
        {"sources": [{"model": "a", "layer_range": [0, 4]}]},
        {
            "sources": [{"model": "b", "layer_range": [2, 6], "parameters": {"scale": [{"filter": "o", "value": 0}]}}],
            "parameters": {"scale": [1, 2]},
        },
    ],
    "merge_method": "passthrough",
    "parameters": {"scale": 0.5},
}
MODULES: dict[str, Any] = {
    "base_model": "base",
    "modules": {
        "text_decoder": {
            "slices": [
                {
                    "sources": [
                        {"model": "a", "layer_range": [0, 2], "parameters": {"weight": [{"filter": "x", "value": 1}]}},
                        {"model": "b", "layer_range": [2, 4]},
                    ],
                    "base_model": "a",
                    "parameters": {"weight": [{"filter": "y", "value": 2}]},
                }
            ],
            "parameters": {"weight": [{"filter": "z", "value": 3}], "density": [0.1, 0.9]},
        },
        "vision_tower": {"models": [{"model": "a", "parameters": {"weight": 0.1}}, {"model": "b"}]},
    },
    "merge_method": "ties",
    "parameters": {"weight": 4, "lambda": 2},
}


def problems(raw: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as found:
        Recipe.from_dict(raw, models_must_exist=False)
    return str(found.value)


def recipe(raw: dict[str, Any]) -> Recipe:
    return Recipe.from_dict(raw, models_must_exist=False)


@pytest.mark.parametrize("raw", [FRANKEN, MODULES], ids=["slices", "modules"])
def test_plain_data_and_yaml_give_the_same_recipe_back(raw: dict[str, Any]) -> None:
    found = recipe(raw)
    again = recipe(found.to_dict())
    assert again == found and again.to_dict() == found.to_dict() and again.digest() == found.digest()
    assert Recipe.from_yaml(found.to_yaml(), models_must_exist=False) == found


def test_what_is_written_back() -> None:
    plain = recipe(FRANKEN).to_dict()
    assert plain["slices"] == [
        {"sources": [{"model": "a", "layer_range": [0, 4]}]},
        {
            "sources": [
                {"model": "b", "layer_range": [2, 6], "parameters": {"scale": [{"filter": "o", "value": 0.0}]}}
            ],
            "parameters": {"scale": [1.0, 2.0]},
        },
    ]
    assert plain["parameters"] == {"scale": 0.5} and "models" not in plain


@pytest.mark.parametrize(
    "change",
    [
        {"slices": FRANKEN["slices"][:1]},
        {"slices": [{"sources": [{"model": "a", "layer_range": [0, 3]}]}, FRANKEN["slices"][1]]},
        {"slices": [FRANKEN["slices"][0], FRANKEN["slices"][1] | {"parameters": {"scale": 1}}]},
        {"parameters": {"scale": 1}},
    ],
)
def test_digest_changes_with_the_parts(change: dict[str, Any]) -> None:
    assert recipe(FRANKEN | change).digest() != recipe(FRANKEN).digest()


def test_levels_of_values_nearest_first() -> None:
    """Source, then slice, then module, then recipe; names by which they are looked up: the models' own."""
    found = recipe(MODULES)
    text, vision = (module.parts[0].recipe for module in found.modules)
    assert text.base is not None and text.base.path == "a" and text.base.layers == (0, 2)
    assert [model.path for model in text.models] == ["b"]
    linear = recipe(
        MODULES | {"merge_method": "linear", "parameters": {"weight": 4}, "base_model": None} | no_density()
    )
    sliced = linear.modules[0].parts[0].recipe
    names = ["x", "y", "z", "other"]
    weights = [sliced.steps_for(name, 0.0).combine for name in names]
    assert [vars(w)["weight"] for w in weights] == [(1.0, 4.0), (2.0, 2.0), (3.0, 3.0), (4.0, 4.0)]
    assert vars(sliced.steps_for("other", 0.0, ("x", "z")).combine)["weight"] == (1.0, 3.0)
    assert [vars(vision.steps_for("n", t).combine)["weight"] for t in (0.0, 1.0)] == [(0.1, 4.0)] * 2
    assert [vars(text.steps_for("n", t).combine)["density"] for t in (0.0, 0.5)] == [(0.1,), (0.5,)]
    assert vars(text.steps_for("n", 0.0).combine)["scale"] == 2.0


def no_density() -> dict[str, Any]:
    text = MODULES["modules"]["text_decoder"]
    modules = MODULES["modules"] | {"text_decoder": text | {"parameters": {"weight": text["parameters"]["weight"]}}}
    return {"modules": modules}


def test_models_are_those_of_all_parts() -> None:
    found = recipe(MODULES)
    assert [model.path for model in found.models] == ["a", "b", "base"] and found.base is not None
    assert found.base.path == "base" and found.listed == ()


def test_base_that_is_not_listed() -> None:
    """It gives the layers that all sources give; a method without one takes none."""
    sources = [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 2]}]
    raw = {"slices": [{"sources": sources}], "base_model": "base", "parameters": {"weight": 1}}
    part = recipe(raw | {"merge_method": "task_arithmetic"}).modules[0].parts[0].recipe
    assert part.base is not None and part.base.layers == (0, 2) and len(part.models) == 2
    part = recipe(raw | {"merge_method": "linear"}).modules[0].parts[0].recipe
    assert part.base is None and len(part.models) == 2
    sources[1] = {"model": "b", "layer_range": [1, 3]}
    assert "list the base base" in problems(raw | {"merge_method": "ties"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": [{"model": "a"}]}, "models and slices are given: a recipe has one of them"),
        ({"slices": {"sources": []}}, "slices: must be a list of {sources: [...]}"),
        ({"slices": [{"sources": []}]}, "slices[0]: must be {sources: [{model, layer_range}, ...]}"),
        ({"slices": [{"sources": [{"model": "a", "layer_rage": [0, 1]}]}]}, "did you mean layer_range?"),
        ({"slices": [{"sources": [{"model": "a", "layer_range": [2, 2]}]}]}, "layer_range must be"),
        ({"slices": [{"sources": [{"model": "a", "layer_range": [0, 1.5]}]}]}, "layer_range must be"),
        ({"slices": [{"source": [], "sources": [{"model": "a"}]}]}, "slices[0]: unknown key 'source'"),
        (
            {"slices": [{"sources": [{"model": "a"}, {"model": "b"}]}]},
            "slices[0]: sources: passthrough merges 1, got 2",
        ),
        ({"slices": [{"sources": [{"model": "a"}, {"model": "a"}]}]}, "slices[0]: sources[1]: a is listed twice"),
        ({"slices": [{"sources": [{"model": "a", "statistics": "s"}]}]}, "unknown key 'statistics'"),
        ({"align": "perms.safetensors"}, "align: is for whole models, not for slices"),
        ({"merge_method": "linear", "parameters": {}}, "slices[0]: linear: weight: must be given for a"),
        ({"merge_method": "emr", "base_model": "base", "parameters": {}}, "emr leaves"),
        ({"merge_method": "esm", "base_model": "base", "parameters": {}}, "esm needs covariance of whole models"),
        ({"merge_method": "knots", "base_model": "base", "parameters": {}}, "knots needs adapters of whole models"),
    ],
)
def test_problems(change: dict[str, Any], message: str) -> None:
    assert message in problems(FRANKEN | change)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([], "models: must be a list"),
        (["text"], "modules: must be a mapping"),
        ({"text": {"parameters": {}}}, "modules.text: must have either models or slices"),
        ({"text": {"models": [{"model": "a"}], "slice": 1}}, "modules.text: unknown key 'slice'"),
        ({"text": {"models": [{"model": "a", "layer_range": [0, 1]}]}}, "unknown key 'layer_range'"),
    ],
)
def test_problems_of_modules(modules: Any, message: str) -> None:
    assert message in problems({"modules": modules, "merge_method": "passthrough"})


def test_stacks_and_modules_by_names() -> None:
    coders = [
        "shared.weight",
        "encoder.block.0.layer.0.w",
        "decoder.block.1.layer.2.w",
        "decoder.norm",
        "lm_head.weight",
    ]
    assert stacks_of(coders) == {"encoder.block": 1, "decoder.block": 2}
    assert list(kinds_of(coders).values()) == ["shared", "encoder", "decoder", "decoder", "shared"]
    sees = ["model.layers.0.w", "visual.blocks.0.w", "visual.merger.mlp.0.weight", "lm_head.weight"]
    assert list(kinds_of(sees).values()) == ["text_decoder", "vision_tower", "multi_modal_projector", "text_decoder"]
    bert = ["bert.encoder.layer.0.w", "bert.pooler.dense.weight"]
    assert set(kinds_of(bert).values()) == {"default"}
    assert modules_of(sees, ["vision_tower"]) == kinds_of(sees)
    by_stack = modules_of(sees, ["visual.blocks", "default"])
    assert by_stack is not None and list(by_stack.values()) == [
        "model.layers",
        "visual.blocks",
        "visual.merger.mlp",
        "default",
    ]
    assert modules_of(sees, ["vision_tower", "visual.blocks"]) is None and modules_of(sees, ["vision"]) is None


BEFORE = """model.embed_tokens.weight transformer.wte.weight transformer.wpe.weight bert.embeddings.LayerNorm.bias
    model.tok_embeddings.weight transformer.rotary_pos_emb.inv_freq transformer.embd.wte.weight embed_positions.weight
    conv1.weight class_embedding ln_pre.weight layernorm_pre.weight vision_model.pre_layrnorm.weight cls_token
    visual.patch_embed.proj.weight transformer.word_embeddings_layernorm.weight model.embedding_norm.weight
    transformer.relative_pe.slopes positional_embedding_vlm patch_conv.weight""".split()
BEHIND = """model.norm.weight lm_head.weight transformer.ln_f.bias bert.pooler.dense.weight
    cls.predictions.decoder.weight
    cls.predictions.transform.LayerNorm.weight classifier.bias pre_classifier.weight vocab_layer_norm.weight
    gpt_neox.final_layer_norm.bias embed_out.weight score.weight output.weight transformer.output_layer.weight
    model.final_layernorm.weight backbone.norm_f.weight qa_outputs.weight post_layernorm.weight layernorm_post.bias
    lm_head.layer_norm.weight final_logits_bias proj_out.weight vit.layernorm.weight""".split()


def test_what_comes_before_and_behind_the_layers() -> None:
    assert [name for name in BEFORE if comes_before(name) is not True] == []
    assert [name for name in BEHIND if comes_before(name) is not False] == []
    assert comes_before("model.memory.weight") is None
