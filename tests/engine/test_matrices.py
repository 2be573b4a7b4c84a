"""Steps for matrices: which tensors they see, split and joined matrices, row blocks, facts, workspace."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import pymerge
from pymerge.engine.plan import SLACK, Options
from pymerge.errors import RecipeError
from pymerge.methods.base import REGISTRY, Calibrate, Combine, MatrixCombine, TaskGroup, param, register
from pymerge.methods.matrices import Matrices
from tests.models import family, random_tensors, read_model, same, tuned_from, write_model

SHAPES = {
    "model.embed_tokens.weight": (96, 16),
    "layers.0.q_proj.weight": (16, 16),
    "layers.0.k_proj.weight": (8, 16),
    "layers.0.norm.weight": (16,),
    "layers.0.qkv.weight": (32, 16),
    "layers.1.q_proj.weight": (16, 16),
    "layers.1.k_proj.weight": (8, 16),
    "lm_head.weight": (96, 16),
}


def first_direction(update: Tensor) -> Tensor:
    """The best approximation of rank one: depends on the whole matrix, rows and columns."""
    u, s, vh = torch.linalg.svd(update.double(), full_matrices=False)
    return (s[0] * torch.outer(u[:, 0], vh[0])).float()


@pytest.fixture(autouse=True)
def methods_of_this_test():
    @register("rank_one")
    @dataclass(frozen=True, kw_only=True)
    class RankOne(MatrixCombine):
        """The leading direction of the sum of the task vectors."""

        scale: float = param(1.0, "lambda")

        def combine(self, group: TaskGroup) -> Tensor:
            total = sum(group.delta(t) for t in range(group.info.tasks))
            assert isinstance(total, Tensor)
            assert total.dim() == 2
            group.notes.facts["norm"] = float(total.norm())
            return self.scale * first_direction(total)

    @register("flattened")
    @dataclass(frozen=True, kw_only=True)
    class Flattened(Calibrate):
        """The leading direction of the update."""

        spectral = True

        def calibrate(self, update: Tensor, group: TaskGroup) -> Tensor:
            group.notes.facts["after"] = group.notes.combine
            return first_direction(update)

    @register("row_maximum")
    @dataclass(frozen=True, kw_only=True)
    class RowMaximum(Combine):
        """Row by row the task vector of largest norm, moved by the row's place so that blocks are told apart."""

        unit: Literal["rows"] = "rows"

        def combine(self, group: TaskGroup) -> Tensor:
            deltas = torch.stack([group.delta(t) for t in range(group.info.tasks)])
            flat = deltas.reshape(len(deltas), deltas.shape[1] if deltas.dim() > 2 else 1, -1)
            best = flat.norm(dim=-1).argmax(0)
            rows = flat[best, torch.arange(flat.shape[1])].reshape(deltas.shape[1:])
            row = group.first // max(1, flat.shape[-1]) + torch.arange(flat.shape[1])
            return rows + row.reshape(-1, *[1] * (rows.dim() - 1)) if rows.dim() > 1 else rows

    yield
    for name in ("rank_one", "flattened", "row_maximum"):
        del REGISTRY[name]


def models() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    base = random_tensors(0, SHAPES)
    return base, [tuned_from(base, 10 + t) for t in range(3)]


def total(name: str, base: dict[str, Tensor], tuned: list[dict[str, Tensor]]) -> Tensor:
    return sum((t[name] - base[name] for t in tuned), torch.zeros(()))


def test_matrices_take_the_method_and_the_rest_the_mean() -> None:
    base, tuned = models()
    merged = pymerge.merge(base, tuned, method="rank_one", scale=0.5)
    for name in SHAPES:
        update = total(name, base, tuned)
        matrix = name.startswith("layers") and "norm" not in name
        expected = 0.5 * (first_direction(update) if matrix else update / 3)
        torch.testing.assert_close(merged[name], base[name] + expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(("rest", "factor"), [("mean", 1 / 3), ("sum", 1.0), ("base", 0.0)])
def test_the_recipe_chooses_matrices_and_rest(rest: str, factor: float) -> None:
    base, tuned = models()
    spectral = {"include": ["lm_head.weight"], "exclude": ["layers.1.*"], "rest": rest}
    merged = pymerge.merge(base, tuned, method="rank_one", spectral=spectral)
    head, aside = "lm_head.weight", "layers.1.q_proj.weight"
    expected = base[head] + first_direction(total(head, base, tuned))
    torch.testing.assert_close(merged[head], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged[aside], base[aside] + factor * total(aside, base, tuned), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "shape", "is_matrix"),
    [
        ("model.layers.0.mlp.gate_proj.weight", (64, 32), True),
        ("encoder.layer.0.attention.output.dense.weight", (64, 32), True),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", (96, 32), True),
        ("h.0.attn.c_attn.weight", (32, 96), True),
        ("embeddings.word_embeddings.weight", (64, 32), False),
        ("model.embed_tokens.weight", (64, 32), False),
        ("transformer.wpe.weight", (64, 32), False),
        ("visual.positional_embedding", (50, 32), False),
        ("lm_head.weight", (64, 32), False),
        ("shared.weight", (64, 32), False),
        ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8), False),
        ("classifier.weight", (10, 32), False),
        ("cls.predictions.decoder.weight", (64, 32), False),
        ("text_projection", (32, 32), False),
        ("vision.conv1.weight", (8, 3, 4, 4), False),
        ("norm.weight", (32,), False),
        ("gate.weight", (1, 32), False),
    ],
)
def test_what_a_matrix_is(name: str, shape: tuple[int, ...], is_matrix: bool) -> None:
    assert Matrices().has(name, shape) is is_matrix


def test_split_merges_the_parts_alone() -> None:
    base, tuned = models()
    name = "layers.0.qkv.weight"
    for split, sizes, dim in (
        (2, (16, 16), 0),
        ([16, 8, 8], (16, 8, 8), 0),
        ({"parts": [4, 12], "dim": 1}, (4, 12), 1),
    ):
        merged = pymerge.merge(base, tuned, method="rank_one", split={"*.qkv.weight": split})
        parts = [first_direction(part) for part in total(name, base, tuned).split(sizes, dim)]
        torch.testing.assert_close(merged[name], base[name] + torch.cat(parts, dim), rtol=0, atol=1e-6)


def test_join_merges_matrices_as_one(tmp_path) -> None:
    base, tuned = models()
    folders = [write_model(tmp_path / str(i), model) for i, model in enumerate((base, *tuned))]
    join = [["layers.*.q_proj.weight", "layers.*.k_proj.weight"]]
    summary = pymerge.merge(folders[0], folders[1:], method="rank_one", join=join, out=tmp_path / "out")
    merged = read_model(tmp_path / "out")
    for layer in (0, 1):
        names = [f"layers.{layer}.{which}_proj.weight" for which in ("q", "k")]
        expected = first_direction(torch.cat([total(name, base, tuned) for name in names])).split([16, 8])
        for name, update in zip(names, expected, strict=True):
            torch.testing.assert_close(merged[name], base[name] + update, rtol=0, atol=1e-6)
        assert summary["per_tensor"][names[0]]["joined"] == names
    assert same(merged, pymerge.merge(base, tuned, method="rank_one", join=join))
    assert summary["recipe"]["join"] == join


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"split": {"*.qkv.weight": [16, 8]}}, r"layers.0.qkv.weight is \[32, 16\]: dimension 0 of 32 is not made up"),
        ({"split": {"*.qkv.weight": 3}}, "not made up of 3 equal parts"),
        ({"split": {"*.norm.weight": 2}}, "layers.0.norm.weight is not merged by a method for matrices"),
        ({"split": {"*.qkv.weight": 1}}, "must be a number of parts"),
        ({"join": [["*.q_proj.weight"]]}, "two or more name patterns"),
        ({"join": [["layers.*.q_proj.weight", "layers.*.v_proj.weight"]]}, "nothing fits layers"),
        ({"join": [["layers.*.q_proj.weight", "layers.*.norm.weight"]]}, "beside layers.1|must be matrices"),
        ({"spectral": {"rest": "median"}}, "must be one of mean, sum, base"),
        ({"spectral": {"includes": []}}, "include"),
    ],
)
def test_wrong_splits_and_joins_say_what_is_wrong(keys: dict[str, Any], message: str) -> None:
    base, tuned = models()
    with pytest.raises(RecipeError, match=message):
        pymerge.merge(base, tuned, method="rank_one", **keys)


def test_facts_and_routing_are_in_the_summary(tmp_path) -> None:
    base, children = family(tmp_path, 3, SHAPES)
    summary = pymerge.merge(
        base, children, method="rank_one", calibrate="flattened", split={"*.qkv.weight": 2}, out=tmp_path / "out"
    )
    written = json.loads((tmp_path / "out" / "merge.json").read_text())
    facts = written["per_tensor"]
    assert set(facts) == {name for name in SHAPES if re.search("proj|qkv", name)}
    assert facts["layers.0.q_proj.weight"]["after"] == "rank_one"
    assert len(facts["layers.0.qkv.weight"]["parts"]) == 2
    assert any("no weight matrices" in note and "3 tensor(s)" in note for note in summary["notes"])


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_calibration_after_ties_keeps_the_scope_of_ties(scope: str) -> None:
    base, tuned = models()
    plain = pymerge.merge(base, tuned, method="ties", scope=scope, density=0.3)
    calibrated = pymerge.merge(base, tuned, method="ties", scope=scope, density=0.3, calibrate="flattened")
    for name in SHAPES:
        update = plain[name] - base[name]
        if Matrices().has(name, SHAPES[name]):
            update = first_direction(update)
        torch.testing.assert_close(calibrated[name], base[name] + update, rtol=0, atol=2e-6, msg=name)


def test_row_blocks_give_the_bits_of_the_whole(tmp_path) -> None:
    base, children = family(
        tmp_path, 2, {"model.embed_tokens.weight": (6000, 1024), "b": (7,), "s": ()}, torch.bfloat16
    )
    tight = SLACK + (60 << 20)  # the embeddings do not fit
    pymerge.merge(base, children, method="row_maximum", out=tmp_path / "tight", options=Options(memory=tight))
    pymerge.merge(base, children, method="row_maximum", out=tmp_path / "wide", options=Options(threads=1))
    assert same(read_model(tmp_path / "tight"), read_model(tmp_path / "wide"))


def test_threads_of_the_merge_do_not_change_bits(tmp_path) -> None:
    base, children = family(tmp_path, 3, SHAPES)
    for threads in (1, 3):
        options = Options(threads=threads)
        pymerge.merge(base, children, method="rank_one", out=tmp_path / str(threads), options=options)
    assert same(read_model(tmp_path / "1"), read_model(tmp_path / "3"))


def test_a_matrix_that_does_not_fit_the_budget_is_refused_before_anything_runs(tmp_path) -> None:
    base, children = family(tmp_path, 3, {"layers.0.w.weight": (2048, 1024)})
    with pytest.raises(RecipeError, match="layers.0.w.weight needs .* MB: raise --memory"):
        pymerge.merge(
            base, children, method="rank_one", out=tmp_path / "out", options=Options(memory=SLACK + (50 << 20))
        )
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_an_interrupted_merge_keeps_its_facts(tmp_path, monkeypatch) -> None:
    base, children = family(tmp_path, 3, SHAPES)
    whole = pymerge.merge(base, children, method="rank_one", out=tmp_path / "whole")
    combine, calls = REGISTRY["rank_one"].combine, []  # type: ignore[attr-defined]

    def failing(self: Any, group: TaskGroup) -> Tensor:
        calls.append(group.info.name)
        if len(calls) == 3:
            raise OSError("the machine went away")
        return combine(self, group)

    with monkeypatch.context() as patch:
        patch.setattr(REGISTRY["rank_one"], "combine", failing)
        with pytest.raises(OSError, match="went away"):
            pymerge.merge(base, children, method="rank_one", out=tmp_path / "out", options=Options(threads=1))
    resumed = pymerge.merge(base, children, method="rank_one", out=tmp_path / "out", options=Options(threads=1))
    assert resumed["per_tensor"] == whole["per_tensor"] and resumed["checksums"] == whole["checksums"]
