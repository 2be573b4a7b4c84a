"""Configs, tokenizers, sentence-transformers folders, the model card, tied weights."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pymerge.checkpoint import Checkpoint, copy_side_files, open_checkpoint, plan_side_files
from pymerge.checkpoint.card import model_card
from pymerge.checkpoint.sidefiles import with_dtype
from pymerge.checkpoint.tied import tied_pairs
from pymerge.errors import InputError, UnsafeFile, UnsafePath
from tests.checkpoint.raw import write_tensors


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_tensors(tmp_path / "base" / "model.safetensors", {"w": b"abcd"})
    return tmp_path / "base"


def copy(base: Path, out_dtype: str | None = None) -> tuple[Path, dict[str, list[str]]]:
    out = base.parent / "out"
    out.mkdir()
    return out, copy_side_files(open_checkpoint(base), out, out_dtype=out_dtype)


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_what_is_copied_and_what_is_not(base: Path) -> None:
    wanted = """
        config.json generation_config.json tokenizer.json tokenizer_config.json tokenizer.model vocab.txt spiece.model
        sentencepiece.bpe.model added_tokens.json special_tokens_map.json vocab.json merges.txt chat_template.jinja
        chat_template.json preprocessor_config.json video_preprocessor_config.json processor_config.json LICENSE
        qwen.tiktoken source.spm
    """.split()
    unwanted = (
        "README.md merge.json optimizer.pt training_args.bin modeling_x.py tf_model.h5 trainer_state.json".split()
    )
    for name in wanted + unwanted:
        (base / name).write_text('{"name": "' + name + '"}')
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ x }}")
    os.chmod(base / "tokenizer.json", 0o400)
    blob = base.parent / "blob"
    (base / "vocab.txt").rename(blob)
    (base / "vocab.txt").symlink_to(blob)
    out, report = copy(base)
    assert tree(out) == sorted([*wanted, "additional_chat_templates/tool_use.jinja"]) == sorted(report["copied"])
    for name in wanted:
        assert (out / name).read_bytes() == (base / name).read_bytes() and not (out / name).is_symlink()
    assert stat.S_IMODE((out / "tokenizer.json").stat().st_mode) == stat.S_IMODE((out / "vocab.json").stat().st_mode)
    notes = "\n".join(report["notes"])
    assert all(name in notes for name in unwanted) and "model.safetensors" not in notes


def test_dtype_fields_follow_the_output(base: Path) -> None:
    config = {
        "b": 1,
        "torch_dtype": "float32",
        "text_config": {"dtype": "float16", "x": None, "deep": {"torch_dtype": "bfloat16"}},
        "vision_config": {"torch_dtype": None},
        "quantization_config": {"dtype": "float16"},
        "a": {"dtype": "nf4"},
    }
    (base / "config.json").write_text(json.dumps(config))
    out, _ = copy(base, "BF16")
    changed = json.loads((out / "config.json").read_text())
    assert changed == config | {
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "x": None, "deep": {"torch_dtype": "bfloat16"}},
        "vision_config": {"torch_dtype": "bfloat16"},
    }
    assert list(changed) == list(config)
    assert with_dtype({"a": 1}, "float16") == {"a": 1, "torch_dtype": "float16"}
    assert with_dtype({"dtype": "float32"}, "float16") == {"dtype": "float16"}


def sentence_transformer(base: Path, modules: list[dict[str, Any]]) -> None:
    (base / "modules.json").write_text(json.dumps(modules))
    (base / "config_sentence_transformers.json").write_text("{}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (base / "2_Dense").mkdir()
    (base / "2_Dense" / "config.json").write_text("{}")


MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def test_changes_of_the_config(base: Path) -> None:
    """Dotted keys; None removes; what is not named stays, the dtype follows the output as well."""
    config = {"a": 1, "text_config": {"layers": 2, "dtype": "float32", "gone": {"x": 1}}, "gone": 0}
    (base / "config.json").write_text(json.dumps(config))
    changes = {"gone": None, "text_config.gone": None, "text_config.layers": 3, "vision.size": 4, "absent": None}
    out = base.parent / "out"
    out.mkdir()
    copy_side_files(open_checkpoint(base), out, out_dtype="BF16", config_changes=changes)
    found = json.loads((out / "config.json").read_text())
    text = {"layers": 3, "dtype": "bfloat16"}
    assert found == {"a": 1, "text_config": text, "vision": {"size": 4}, "torch_dtype": "bfloat16"}
    assert json.loads((base / "config.json").read_text()) == config


def test_sentence_transformers_folders(base: Path) -> None:
    sentence_transformer(base, MODULES)
    write_tensors(base / "2_Dense" / "model.safetensors", {"linear.weight": b"1234"})
    (base / "2_Dense" / "pytorch_model.bin").write_bytes(b"not copied")
    out, report = copy(base)
    modules = ["1_Pooling/config.json", "2_Dense/config.json"]
    assert tree(out) == sorted([*modules, "modules.json", "config_sentence_transformers.json"])
    assert report["notes"] == ["not copied from the base: 2_Dense/pytorch_model.bin"]  # what is merged is not told


def test_sentence_transformers_folders_that_are_refused(base: Path) -> None:
    sentence_transformer(base, MODULES)
    (base / "2_Dense" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsafeFile, match="2_Dense/pytorch_model.bin: pickled weights"):
        plan_side_files(open_checkpoint(base))
    (base / "modules.json").write_text('[{"path": "../secret", "type": "x"}]')
    with pytest.raises(UnsafePath):
        plan_side_files(open_checkpoint(base))
    (base / "modules.json").write_text('[{"path": "4_Absent", "type": "x.Dense"}]')
    with pytest.raises(InputError, match="4_Absent"):
        plan_side_files(open_checkpoint(base))


def test_memory_has_no_side_files(tmp_path: Path) -> None:
    report = copy_side_files(open_checkpoint({"a": torch.ones(1)}), tmp_path, out_dtype="F32")
    assert report["copied"] == [] and not tree(tmp_path)


class Recipe:
    def to_dict(self) -> dict[str, Any]:
        return {
            "base_model": "org/base",
            "models": [{"model": "org/ma|th"}, {"model": "a`b\n"}],
            "merge_method": "ties",
        }

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict() | {"note": "```\n# not a heading"})


def test_model_card() -> None:
    card = model_card(Recipe(), {"pymerge": "1.2", "relaxations": {"extra": "drop"}}, "transformers")
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": ["org/base", "org/ma|th", "a`b\n"],
        "library_name": "transformers",
        "tags": ["merge", "pymerge", "ties"],
    }
    assert "`org/ma\\|th`" in text and "`` a`b  ``" in text and "`extra: drop`" in text
    fenced = text.split("````yaml\n")[1].split("\n````")[0]
    assert yaml.safe_load(fenced)["merge_method"] == "ties"
    assert "library_name" not in model_card(Recipe(), {}, None)


def checkpoint(config: dict[str, Any] | None, *names: str) -> Checkpoint:
    found = open_checkpoint({name: torch.ones(2, 2) for name in names})
    found.config = config
    return found


EMBED, HEAD, TIED = "model.embed_tokens.weight", "lm_head.weight", {"tie_word_embeddings": True}
TIE_CASES = [
    (TIED, [EMBED], {HEAD: EMBED}),
    (TIED, [EMBED, HEAD], {HEAD: EMBED}),
    ({"tie_word_embeddings": False}, [EMBED, HEAD], {}),
    ({"text_config": {"tie_word_embeddings": False}}, [EMBED], {}),
    ({}, ["transformer.wte.weight"], {HEAD: "transformer.wte.weight"}),
    ({}, [EMBED, HEAD], {HEAD: None}),
    (None, [EMBED], {}),
    ({}, ["encoder.w"], {}),
    ({}, ["shared.weight"], {"decoder.embed_tokens.weight": "shared.weight", HEAD: "shared.weight"}),
    (TIED, [f"language_model.{EMBED}"], {f"language_model.{HEAD}": f"language_model.{EMBED}"}),
]


@pytest.mark.parametrize(("config", "names", "pairs"), TIE_CASES)
def test_S26_tied_pairs_follow_the_config(config: dict | None, names: list[str], pairs: dict[str, str | None]) -> None:
    found = tied_pairs(checkpoint(config, *names))
    assert {name: found.get(name) for name in pairs} == pairs
    if not pairs:
        assert found == {}
