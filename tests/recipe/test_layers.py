from __future__ import annotations

from pymerge.recipe import layer_depths, layer_positions


def test_position_is_index_over_last_layer_and_zero_outside() -> None:
    names = ["model.embed_tokens.weight", "model.norm.weight", *(f"model.layers.{i}.mlp.up.weight" for i in range(5))]
    positions = layer_positions(names)
    assert list(positions) == names
    assert [positions[n] for n in names] == [0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0]


def test_one_layer_is_at_the_end() -> None:
    assert layer_positions(["h.0.attn.weight"]) == {"h.0.attn.weight": 1.0}


def test_stacks_are_counted_apart() -> None:
    positions = layer_positions(["vision.blocks.0.w", "vision.blocks.1.w", "text.layers.1.w", "text.layers.4.w"])
    assert positions == {
        "vision.blocks.0.w": 0.0,
        "vision.blocks.1.w": 1.0,
        "text.layers.1.w": 0.25,
        "text.layers.4.w": 1.0,
    }


def test_the_first_number_is_the_layer() -> None:
    positions = layer_positions(["model.layers.1.experts.7.w1.weight", "model.layers.2.experts.0.w1.weight"])
    assert list(positions.values()) == [0.5, 1.0]


def test_depth_tells_no_layer_from_the_first() -> None:
    depths = layer_depths(["embed.weight", "h.0.w", "h.3.w", "head.weight"])
    assert depths == {"embed.weight": None, "h.0.w": 0.0, "h.3.w": 1.0, "head.weight": None}
