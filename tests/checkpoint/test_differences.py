"""In what two merges differ, in words."""

from __future__ import annotations

import json

import pytest

from pymerge.checkpoint.journal import differences

MODEL = {"path": "/m", "files": [["a.safetensors", 10, 1, "x"], ["b.safetensors", 20, 2, "y"]], "notes": []}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"path": "/n", "files": []}, ['inputs[0]: was "/m", is now "/n"']),
        ({"notes": ["z"]}, ['inputs[0].notes: was [], is now ["z"]']),
        (
            {"files": [["a.safetensors", 11, 3, "x"], ["c.safetensors", 1, 1, "z"]]},
            [
                "/m: a.safetensors has changed (size, time of change)",
                "/m: b.safetensors is gone",
                "/m: c.safetensors is new",
            ],
        ),
        ({"files": [1]}, [f"inputs[0].files: was {json.dumps(MODEL['files'])}, is now [1]"]),
    ],
)
def test_inputs(change, said):
    found = differences({"inputs": [MODEL], "seed": 0}, {"inputs": [MODEL | change], "seed": 1})
    assert found == [*said, "seed: was 0, is now 1"]
