"""`pymerge observe` on files: text in lines and JSON, images; a model folder as transformers saves it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pymerge.cli import app
from pymerge.errors import InputError
from pymerge.statistics import open_statistics
from pymerge.statistics.samples import batches_of

transformers = pytest.importorskip("transformers")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    transformers.BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=14, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "x.txt").write_text("the quick fox\n\na lazy dog jumps over the fox\nfox\n")
    lines = [json.dumps({"text": line}) for line in ("the quick fox", "a lazy dog jumps over the fox", "fox")]
    (folder / "x.jsonl").write_text("\n".join(lines))
    return folder


def test_the_command_writes_statistics_of_all_layers(bert: Path, text: Path, tmp_path: Path) -> None:
    for name in ("x.txt", "x.jsonl"):
        out = tmp_path / f"{name}.stats.safetensors"
        done = CliRunner().invoke(
            app, ["observe", str(bert), "--data", str(text / name), "-o", str(out), "--batch-size", "2"]
        )
        assert done.exit_code == 0, done.output
        found = open_statistics(out)
        rows = (3 + 7 + 1) + 3 * 2  # words and the two marks of each sample
        assert found["bert.encoder.layer.0.attention.self.query"].rows == rows
        assert found.header.modules["bert.encoder.layer.0.attention.self.key"].endswith("query")
        assert "cls.predictions.decoder" not in found
        found.close()
    first, second = (open_statistics(tmp_path / f"{name}.stats.safetensors") for name in ("x.txt", "x.jsonl"))
    for module in first.modules:
        assert torch.equal(first[module].second_moment(), second[module].second_moment())


def test_samples_and_length_are_limits(bert: Path, text: Path) -> None:
    batches = list(batches_of(bert, text / "x.txt", samples=2, length=4, batch_size=8))
    assert len(batches) == 1 and batches[0]["input_ids"].shape == (2, 4)


def test_a_folder_of_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    model = tmp_path / "vit"
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(model)
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(model)
    (tmp_path / "images").mkdir()
    for i in range(3):
        image.new("RGB", (16, 16), (40 * i, 10, 200)).save(tmp_path / "images" / f"{i}.png")
    out = tmp_path / "vit.stats.safetensors"
    done = CliRunner().invoke(app, ["observe", str(model), "--data", str(tmp_path / "images"), "-o", str(out)])
    assert done.exit_code == 0, done.output
    found = open_statistics(out)
    assert all(found[module].rows == 3 * 5 for module in found.modules) and len(found.modules) == 6


def test_wrong_data_says_what_is_wrong(bert: Path, text: Path, tmp_path: Path) -> None:
    def read(path: Path, **keys: str) -> None:
        list(batches_of(bert, path, samples=4, length=8, batch_size=2, **keys))

    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "nothing.txt")
    with pytest.raises(InputError, match="line 1: needs a key 'prompt', it has text"):
        read(text / "x.jsonl", field="prompt")
    (tmp_path / "broken.jsonl").write_text("{no")
    with pytest.raises(InputError, match="line 1: .* is no JSON object"):
        read(tmp_path / "broken.jsonl")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="holds no samples"):
        read(tmp_path / "empty.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        read(tmp_path / "folder")
