"""Models merged by ESM++ as they are used: routing, padding, caches, against dense models with W + B A."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pymerge.errors import CorruptFile, InputError
from pymerge.runtime import esmpp

pytest.importorskip("transformers")
from tests.runtime.routed import KINDS, TASKS, WORDS, Merged, inputs, make, merged  # noqa: E402


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Merged]:
    """Experts of rank 8 (of 32) in all matrices."""
    return {kind: merged(kind, tmp_path_factory.mktemp(kind), expert_rank=8, routed="*") for kind in KINDS}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model(**batch).logits


def mixed(kind: str, each: int) -> tuple[dict[str, Tensor], Tensor]:
    """Samples of all tasks in one batch, not in order; the task of each."""
    batches = [inputs(kind, task, each, seed=1) for task in range(TASKS)]
    order = torch.randperm(each * TASKS, generator=torch.Generator().manual_seed(0))
    batch = {key: torch.cat([b[key] for b in batches])[order] for key in batches[0]}
    return batch, torch.arange(TASKS).repeat_interleave(each)[order]


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_takes_its_tasks_experts(families: dict[str, Merged], kind: str) -> None:
    model, (batch, tasks) = esmpp.load(families[kind].out), mixed(kind, 5)
    found = logits(model, batch)
    routes = esmpp.routes(model)
    with safe_open(families[kind].out / esmpp.EXPERTS, "pt") as file:
        assert set(routes) == set(json.loads(file.metadata()["prototypes"])) and len(routes) >= 8
    assert all(torch.equal(chosen, tasks) for chosen in routes.values())
    for task in range(TASKS):
        dense = logits(families[kind].dense(task), batch)
        torch.testing.assert_close(found[tasks == task], dense[tasks == task], rtol=1e-4, atol=1e-4)
        forced = esmpp.load(families[kind].out, task=str(families[kind].models[task]))
        torch.testing.assert_close(logits(forced, batch), dense, rtol=1e-4, atol=1e-4)
        esmpp.force(model, task)
        torch.testing.assert_close(logits(model, batch), dense, rtol=1e-4, atol=1e-4)
    esmpp.force(model, None)
    assert torch.equal(logits(model, batch), found)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_near_those_of_the_task_models(families: dict[str, Merged], kind: str, tmp_path: Path) -> None:
    rank = {"vit": 24}.get(kind, 8)  # its updates, random numbers, have no leading directions
    one = families[kind] if rank == 8 else merged(kind, tmp_path, expert_rank=rank, routed="*")
    batch, tasks = mixed(kind, 40)
    truth = torch.cat([logits(one.individual(t), batch)[None] for t in range(TASKS)])[tasks, torch.arange(len(tasks))]
    same = [
        (logits(model, batch).argmax(-1) == truth.argmax(-1)).float().mean()
        for model in (esmpp.load(one.out), one.plain())
    ]
    assert same[0] > 0.9 and same[1] < 0.7, same


@pytest.mark.parametrize(("kind", "error"), [("vit", 1e-4), ("bert", 5e-3), ("gpt2", 5e-3)])  # float32, float16 twice
def test_experts_of_full_rank_are_the_task_models(tmp_path: Path, kind: str, error: float) -> None:
    one = merged(kind, tmp_path, expert_rank=48, routed="*")
    model, (batch, tasks) = esmpp.load(one.out), mixed(kind, 5)
    found = logits(model, batch)
    for task in range(TASKS):
        expected = logits(one.individual(task), batch)[tasks == task]
        assert float((found[tasks == task] - expected).norm() / expected.norm()) < error


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_padding_is_not_looked_at(families: dict[str, Merged], kind: str) -> None:
    model, (batch, tasks) = esmpp.load(families[kind].out), mixed(kind, 3)
    alone = logits(model, batch)
    length = batch["input_ids"].shape[1]
    other = inputs(kind, 0, len(tasks), seed=2)["input_ids"].repeat(1, 3)  # task 0's words, three times as many
    ids = torch.cat([batch["input_ids"], other], 1)
    mask = (torch.arange(ids.shape[1]) < length).long().expand_as(ids)
    padded = logits(model, {"input_ids": ids, "attention_mask": mask})
    torch.testing.assert_close(padded[:, :length] if kind == "llama" else padded, alone, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        positional = model(ids, mask).logits
    assert torch.equal(positional, padded)
    logits(model, {"input_ids": ids})
    assert not all(torch.equal(chosen, tasks) for chosen in esmpp.routes(model).values())


def prompts(one: Merged) -> tuple[dict[str, Tensor], Tensor]:
    """Prompts of different lengths, padded on the left with a task's word."""
    batch, tasks = mixed(one.kind, 2)
    mask = batch["attention_mask"].clone()
    for i in range(len(mask)):
        mask[i, : i % 4] = 0
    ids = torch.where(mask.bool(), batch["input_ids"], 1 + WORDS)
    return {"input_ids": ids, "attention_mask": mask}, tasks


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation_keeps_the_prompts_experts(families: dict[str, Merged], kind: str, how: dict[str, Any]) -> None:
    one = families[kind]
    model: Any = esmpp.load(one.out)
    batch, tasks = prompts(one)
    given = {"max_new_tokens": 2 if how.get("use_cache") is False else 8, "do_sample": False, "pad_token_id": 0, **how}
    found = model.generate(**batch, **given)
    for task in range(TASKS):
        expected = one.dense(task).generate(**batch, **given)
        assert torch.equal(found[tasks == task], expected[tasks == task])


def test_what_is_generated_does_not_route(families: dict[str, Merged]) -> None:
    """Words of another task behind the prompt, with the prompt's cache: the experts stay; without it they change."""
    model: Any = esmpp.load(families["llama"].out)
    first, second = (inputs("llama", task, 4)["input_ids"] for task in (0, 1))
    with torch.inference_mode():
        start, other = model(first, use_cache=True), model(second, use_cache=True)
        for cache, more, task in [(start, second.repeat(1, 3), 0), (other, first, 1), (start, first[:, :1], 0)]:
            model(more, past_key_values=cache.past_key_values)
            assert all(torch.equal(r, torch.full((4,), task)) for r in esmpp.routes(model).values())
        model(torch.cat([first, second.repeat(1, 3)], 1))
        assert not all(torch.equal(r, torch.zeros(4).long()) for r in esmpp.routes(model).values())
        with pytest.raises(InputError, match="the cache is of 4 prompts, 3 samples go on with it"):
            model(first[:3], past_key_values=start.past_key_values)
        foreign = families["llama"].plain()(first, use_cache=True).past_key_values
        with pytest.raises(InputError, match="was not filled by this model with its experts"):
            model(first[:, :1], past_key_values=foreign)
        assert not esmpp.router_of(model).calls  # a refused call leaves nothing behind


def test_an_interrupted_pass_leaves_nothing_behind(families: dict[str, Merged]) -> None:
    model: Any = esmpp.load(families["llama"].out)
    first, second = (inputs("llama", task, 4)["input_ids"] for task in (0, 1))
    with torch.inference_mode():
        start = model(first, use_cache=True)

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(second)
        handle.remove()
        model(second, past_key_values=start.past_key_values)
    assert all(torch.equal(chosen, torch.zeros(4).long()) for chosen in esmpp.routes(model).values())


def test_encoder_and_decoder_have_their_own_padding(tmp_path: Path) -> None:
    tf: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    model: Any = tf.T5ForConditionalGeneration(tf.T5Config(**size, decoder_start_token_id=0)).eval()
    seen: dict[str, Tensor] = {}
    router = esmpp.Router(["a", "b"], None)
    for name in ("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.1.EncDecAttention.k"):
        factors = torch.zeros(2, 16, 1), torch.zeros(2, 1, 16)
        experts = esmpp.Experts(name, *factors, torch.randn(2, 16), router)
        experts.chosen = lambda x, mask, name=name: (seen.update({name: mask}), torch.zeros(len(x)).long())[1]  # type: ignore[method-assign]
        experts.attach(model.get_submodule(name))
    for module in esmpp.callers(model):
        router.watch(module)
    ids, mask = torch.randint(1, 20, (2, 5)), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3)
    assert len(seen) == 2 and all(torch.equal(m, mask.bool()) for m in seen.values())


def fused(first: bool, tasks: int = 2) -> tuple[nn.MultiheadAttention, list[nn.MultiheadAttention], esmpp.Router]:
    """A routed attention, and the dense ones."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=first).eval()
    left, right = torch.randn(tasks, 24, 3), torch.randn(tasks, 3, 8)
    dense = [copy.deepcopy(layer) for _ in range(tasks)]
    for t, one in enumerate(dense):
        one.in_proj_weight = nn.Parameter(layer.in_proj_weight + left[t] @ right[t])
    router = esmpp.Router([str(t) for t in range(tasks)], None)
    esmpp.Experts("x", left, right, torch.eye(tasks, 8), router).attach(layer)
    return layer, dense, router


@pytest.mark.parametrize("first", [True, False])
def test_fused_attention(first: bool) -> None:
    layer, dense, router = fused(first)
    x = torch.randn(5, 6, 8) * 0.1
    tasks = torch.tensor([0, 1, 1, 0, 1])
    x[torch.arange(5), :, tasks] += 3
    hidden = torch.arange(6).expand(5, 6) >= torch.tensor([6, 4, 3, 6, 5])[:, None]
    causal = torch.ones(6, 6).triu(1).bool()
    for more in ({}, {"key_padding_mask": hidden}, {"attn_mask": causal}, {"attn_mask": causal.expand(10, 6, 6)}):
        given = [x if first else x.transpose(0, 1)] * 3
        out, weights = layer(*given, **more)
        for task, one in enumerate(dense):
            expected, attended = one(*given, **more)
            mine, theirs = (y if first else y.transpose(0, 1) for y in (out, expected))
            torch.testing.assert_close(mine[tasks == task], theirs[tasks == task])
            torch.testing.assert_close(weights[tasks == task], attended[tasks == task])
    assert torch.equal(router.last["x"], tasks) and layer(*given, need_weights=False)[1] is None
    torch.testing.assert_close(layer(x[1], x[1], x[1])[0], dense[1](x[1], x[1], x[1])[0])


def test_length_of_the_mean_does_not_matter_and_shapes_are_kept() -> None:
    torch.manual_seed(0)
    layer, left, right = nn.Linear(6, 4), torch.randn(3, 4, 2), torch.randn(3, 2, 6)
    prototypes = torch.nn.functional.normalize(torch.randn(3, 6), dim=1)
    router = esmpp.Router("abc", None)
    plain = copy.deepcopy(layer)
    esmpp.Experts("x", left, right, prototypes, router).attach(layer)
    x = torch.randn(20, 7, 6)
    layer(x)
    chosen = torch.nn.functional.cosine_similarity(x.mean(1)[:, None], prototypes[None], dim=-1).argmax(1)
    assert torch.equal(router.last["x"], chosen) and len(chosen.unique()) == 3
    for scale in (1e-6, 1e6):
        layer(x * scale)
        assert torch.equal(router.last["x"], chosen)
    image = x[:, :6].reshape(20, 2, 3, 6)
    torch.testing.assert_close(layer(image), layer(x[:, :6]).reshape(20, 2, 3, 4))
    torch.testing.assert_close(layer(x[:, 0]), torch.cat([layer(row[None]) for row in x[:, 0]]))
    assert layer(x[:0]).shape == (0, 7, 4) and layer(torch.zeros(2, 3, 6)).isfinite().all()
    expected = plain(x) + torch.einsum("tmr,trn,bsn->btsm", left, right, x)[torch.arange(20), chosen]
    torch.testing.assert_close(layer(x), expected)


def test_rows_and_windows_are_taken_apart_by_sample() -> None:
    from pymerge.runtime.routing import Call, samples

    x, mask = torch.arange(24.0).reshape(12, 2), torch.ones(3, 4).bool()
    found, seen = samples(x, Call(masks=(mask,), routes={}))
    assert torch.equal(found, x.reshape(3, 4, 2)) and seen is not None
    assert samples(x, Call(routes={}))[0].shape == (12, 1, 2)
    windows, seen = samples(x.reshape(6, 2, 2), Call(batch=3, masks=(mask,), routes={}))
    assert torch.equal(windows, x.reshape(3, 4, 2)) and seen is None
    assert samples(x.reshape(6, 2, 2), Call(batch=4, routes={}))[0].shape == (6, 2, 2)


def test_bfloat16_and_copies(tmp_path: Path) -> None:
    one = merged("llama", tmp_path, torch.bfloat16, expert_rank=8)
    model: Any = esmpp.load(one.out)
    batch, tasks = mixed("llama", 4)
    found = logits(model, batch)
    assert found.dtype == torch.bfloat16
    assert all(torch.equal(chosen, tasks) for chosen in esmpp.routes(model).values())
    for task in range(TASKS):
        expected = logits(one.dense(task), batch)[tasks == task].float()
        assert float((found[tasks == task].float() - expected).norm() / expected.norm()) < 0.03
    twin = copy.deepcopy(model)
    esmpp.force(twin, 0)
    assert not torch.equal(logits(twin, batch), found) and torch.equal(logits(model, batch), found)
    assert model.state_dict().keys() == make("llama").state_dict().keys()
    assert model.double()(**batch).logits.dtype == torch.float64


def test_what_cannot_be_used_says_why(families: dict[str, Merged], tmp_path: Path) -> None:
    one = families["bert"]
    file = one.out / esmpp.EXPERTS
    with pytest.raises(
        InputError, match="no esmpp_experts.safetensors here: not a model merged with merge_method esmpp"
    ):
        esmpp.load(one.models[0])
    with pytest.raises(InputError, match=r"task 3: the merge had 0: .*m0, 1: .*m1, 2: "):
        esmpp.load(one.out, task=3)
    with pytest.raises(InputError, match="BertForSequenceClassification has no experts"):
        esmpp.routes(one.plain())
    with pytest.raises(InputError, match=r"experts of .* and 8 more: LlamaForCausalLM has no such linear layer"):
        esmpp.attach(make("llama"), one.out)
    with pytest.raises(InputError, match="has experts already"):
        esmpp.attach(esmpp.load(one.out), one.out)
    narrow = one.plain()
    narrow.bert.encoder.layer[0].intermediate.dense = nn.Linear(32, 40)
    with pytest.raises(
        InputError, match=r"intermediate.dense.weight are for a matrix \[48, 32\], the layer's is \[40, 32\]"
    ):
        esmpp.attach(narrow, one.out)
    tensors = load_file(file)
    save_file(tensors, tmp_path / esmpp.EXPERTS, {"pymerge_esmpp": "2"})
    with pytest.raises(InputError, match="experts of format 1 are read, found: 2; merge again"):
        esmpp.attach(one.plain(), tmp_path)
    (tmp_path / esmpp.EXPERTS).write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptFile, match="damaged"):
        esmpp.attach(one.plain(), tmp_path)
