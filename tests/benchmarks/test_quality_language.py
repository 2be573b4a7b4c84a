"""The language family of the quality suite, with a model and texts of a size for tests."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pymerge

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from benchmarks.quality import text
from benchmarks.quality.language import SCORED, Language, Settings, read_text, spread

SEED = 0
TINY = Settings(width=32, inner=48, layers=1, heads=2, key_value_heads=1, window=32, base_steps=20, task_steps=20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language") / f"seed-{SEED}"
    Language(TINY).train(folder, SEED, lambda line: None)
    return folder


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


class Constant(nn.Module):
    """The same probabilities of the next byte, whatever came before."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, 256))


def test_a_document_belongs_to_one_part_wherever_it_is_found():
    documents = [bytes([65 + n % 26]) * (200 + n) for n in range(100)]
    parts = text.divide(iter(documents))
    assert sum(len(part) + bool(part) for part in parts.values()) == sum(len(document) + 1 for document in documents)
    assert all(len(part) > 200 for part in parts.values())
    assert text.divide(reversed(documents + documents[:50])) == parts


def test_short_documents_are_left_out_and_parts_end_at_the_limit(monkeypatch: pytest.MonkeyPatch):
    assert not any(text.divide(iter([b"x" * 199])).values())
    monkeypatch.setattr(text, "MOST", 300)
    assert sum(map(len, text.divide(iter([b"x" * 500])).values())) == 300


def test_pieces_end_with_lines_and_lose_nothing():
    lines = b"".join(b"%d\n" % n for n in range(1000)) + b"end"
    cut = list(text.pieces(lines, 100))
    assert b"".join(cut) == lines
    assert all(100 < len(piece) < 110 and piece.endswith(b"\n") for piece in cut[:-1])


def test_missing_text_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text, "KINDS", {"python": lambda: iter([b"x" * 300])})
    text.texts.cache_clear()
    with pytest.raises(pymerge.MergeError, match="python: 0 bytes of"):
        text.texts()
    text.texts.cache_clear()
    with pytest.raises(pymerge.MergeError, match="pip install no_such_package"):
        text.package("no_such_package")


def test_windows_are_spread_from_the_first_byte_to_the_last():
    windows = spread(torch.arange(100, dtype=torch.uint8), 4, 10)
    assert windows[:, 0].tolist() == [0, 30, 60, 90]
    assert windows[-1].tolist() == list(range(90, 100))


def test_score_is_bits_per_byte(trained: Path):
    family = Language(TINY)
    assert family.score(Constant(torch.zeros(256)), "prose", trained, "test") == pytest.approx(8)
    windows = spread(read_text(trained, "prose", "validation"), SCORED, TINY.window + 1)[:, 1:]
    logits = torch.zeros(256)
    logits[ord(" ")] = 3.0  # probabilities e^3 / (255 + e^3) of a space and 1 / (255 + e^3) of others
    bits = (torch.tensor(3.0).exp() + 255).log2() - 3 * (windows == ord(" ")).float().mean() / torch.tensor(2.0).log()
    assert family.score(Constant(logits), "prose", trained, "validation") == pytest.approx(bits.item(), rel=1e-5)


def test_a_fine_tuned_model_is_better_at_its_text(trained: Path):
    family = Language(TINY)
    base = family.load(trained / "base")
    for task in family.tasks:
        tuned = family.load(trained / "tasks" / task)
        assert family.score(tuned, task, trained, "test") < family.score(base, task, trained, "test") - 0.02


def test_training_is_deterministic_and_done_once(trained: Path, tmp_path: Path):
    family, lines = Language(TINY), []
    family.train(trained, SEED, lines.append)
    assert lines == []
    family.train(tmp_path / "again", SEED, lambda line: None)
    family.train(tmp_path / "other", SEED + 1, lines.append)
    assert len(lines) == len(family.tasks)  # the base is there
    assert weights(tmp_path / "other" / "base") == weights(tmp_path / "again" / "base") == weights(trained / "base")
    for task in family.tasks:
        assert weights(tmp_path / "again" / "tasks" / task) == weights(trained / "tasks" / task)
        assert weights(tmp_path / "other" / "tasks" / task) != weights(trained / "tasks" / task)


def test_other_settings_train_again(trained: Path, tmp_path: Path):
    small = Settings(width=16, inner=16, layers=1, heads=1, key_value_heads=1, window=8, base_steps=20, task_steps=20)
    folder, lines = tmp_path / "seed", []
    Language(small).train(folder, SEED, lambda line: None)
    base, before = weights(folder / "base"), weights(folder / "tasks" / "tables")
    Language(replace(small, task_rate=2 * small.task_rate)).train(folder, SEED, lines.append)
    assert len(lines) == len(Language.tasks)  # the base stays
    assert weights(folder / "base") == base
    assert weights(folder / "tasks" / "tables") != before


def test_models_are_observed_on_their_samples_and_merge(trained: Path, tmp_path: Path):
    family = Language(TINY)
    models = [trained / "tasks" / task for task in family.tasks]
    seen = [pymerge.observe(m, family.samples(trained, task)) for m, task in zip(models, family.tasks, strict=True)]
    assert "model.layers.0.mlp.down_proj" in seen[0].modules
    pymerge.merge(trained / "base", models, method="esm", statistics=seen, out=tmp_path / "merged")
    merged, base = family.load(tmp_path / "merged"), family.load(trained / "base")
    better = [family.score(merged, t, trained, "test") < family.score(base, t, trained, "test") for t in family.tasks]
    assert sum(better) > len(better) / 2
