"""Writes the seeds of the fuzzer: small valid files of every kind, and near misses."""

from __future__ import annotations

import json
import struct
from pathlib import Path

HERE = Path(__file__).parent / "corpus"
MODELS = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: [0, 0.5, 1]}}]\n"


def safetensors(header: object, size: int) -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(size)


def entry(dtype: str, shape: list[int], first: int, last: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


SEEDS: dict[str, list[bytes]] = {
    "header": [
        safetensors({}, 0),
        safetensors({"w": entry("F32", [2, 3], 0, 24)}, 24),
        safetensors(
            {"__metadata__": {"format": "pt"}, "a": entry("BF16", [4], 0, 8), "b": entry("I64", [], 8, 16)}, 16
        ),
        safetensors({"a": entry("U8", [0, 4], 0, 0), "b": entry("BOOL", [3], 0, 3)}, 3),
        safetensors({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, 12),
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
    "index": [
        json.dumps({"metadata": {"total_size": 8}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}).encode(),
        json.dumps({"weight_map": {"a": "../x.safetensors", "b": "/etc/passwd", "c": "C:\\x"}}).encode(),
        b'{"weight_map": {"a": "x.bin"}}',
    ],
    "recipe": [
        ("merge_method: ties\nbase_model: base\n" + MODELS + "parameters: {density: 0.5}\ndtype: bfloat16\n").encode(),
        ("merge_method: linear\n" + MODELS + "exclude: ['*.bias']\nstrict: false\n").encode(),
        b"merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\n"
        b"parameters: {t: [{filter: mlp, value: 0.5}, {value: 0}]}\n",
        b"merge_method: tsv_m\nbase_model: b\nmodels: [{model: a}]\ncalibrate: svc\nspectral: {rest: mean}\n",
        b"merge_method: ties\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1}}]\n"
        b"purify: [{method: dare, density: 0.5}]\n",
        b"a: &a [*a]\n",
        b"a: &a [1,1]\nb: &b [*a,*a]\nc: [*b,*b]\n",
    ],
    "adapter": [
        json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}).encode(),
        json.dumps(
            {
                "peft_type": "LORA",
                "r": 4,
                "lora_alpha": 8,
                "use_rslora": True,
                "rank_pattern": {"q_proj": 2},
                "alpha_pattern": {"^.*v_proj$": 3},
                "base_model_name_or_path": "base",
            }
        ).encode(),
        json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_dora": True}).encode(),
    ],
    "journal": [
        b'{"identity":{"recipe":{}},"pymerge_journal":1}\n{"c":1,"n":8,"o":0,"t":"w"}\n{"c":2,"f":{},"n":8,"o":4,"t":"w"}\n',
        b'{"identity":{},"pymerge_journal":1}\n{"t":"w"}\n',
        b'{"identity":[],"pymerge_journal":2}\n',
    ],
}


def main() -> None:
    for target, seeds in SEEDS.items():
        (HERE / target).mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds):
            (HERE / target / f"seed{number}").write_bytes(seed)


if __name__ == "__main__":
    main()
