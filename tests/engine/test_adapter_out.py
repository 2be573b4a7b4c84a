"""Results as LoRA adapters, and adapters of fine-tuned models; with PEFT, where it is installed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import pymerge
from pymerge.checkpoint import open_checkpoint
from pymerge.cli import app
from pymerge.engine.adapter_out import extract
from pymerge.engine.adapter_sink import decomposition_bytes
from pymerge.errors import OutputError, RecipeError
from tests.adapters import SHAPES, TARGETS, adapted, random_factors, write_adapter
from tests.models import random_tensors, read_model, write_model

MATRICES = {f"{module}.weight": SHAPES[f"{module}.weight"] for module in TARGETS}


@pytest.fixture
def problem(tmp_path: Path) -> tuple[Path, list[Path], list[dict[str, Tensor]]]:
    base = write_model(tmp_path / "base", random_tensors(0, SHAPES, scale=0.05))
    factors = [random_factors(t + 1, MATRICES, rank=3 + t) for t in range(2)]
    return base, [write_adapter(tmp_path / f"adapter{t}", f, base) for t, f in enumerate(factors)], factors


def update_by(folder: Path, base: Path) -> dict[str, Tensor]:
    """What an adapter adds to its base."""
    start = read_model(base)
    with open_checkpoint(folder) as model:
        return {name: model[name].load().double() - start[name].double() for name in start}


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv_m", "iso_c", "ace", "knots", "core_space"])
def test_exact(method: str, problem: Any, tmp_path: Path) -> None:
    base, adapters, _ = problem
    summary = pymerge.merge(base, adapters, method=method, as_adapter=True, out=tmp_path / "adapter")
    pymerge.merge(base, adapters, method=method, out=tmp_path / "whole")
    assert summary["error"] < 1e-6 and summary["r"] <= 7
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "adapter").iterdir()}
    assert len(set(modes.values())) == 1, modes
    found, start, whole = update_by(tmp_path / "adapter", base), read_model(base), read_model(tmp_path / "whole")
    for name in start:
        torch.testing.assert_close(found[name], whole[name].double() - start[name], rtol=0, atol=1e-6)


def test_truncated_is_the_best_of_its_rank_and_says_what_is_lost(problem: Any, tmp_path: Path) -> None:
    base, adapters, factors = problem
    given = {"scale": 1.0, "as_adapter": 4}
    summary = pymerge.merge(base, adapters, method="task_arithmetic", out=tmp_path / "adapter", **given)
    found = update_by(tmp_path / "adapter", base)
    start = {name: torch.zeros(shape) for name, shape in MATRICES.items()}
    lost, square = 0.0, 0.0
    for name in MATRICES:
        whole = torch.stack([adapted(start, f)[name] for f in factors]).sum(0)
        s = torch.linalg.svdvals(whole)
        error = float(s[4:].norm() / s.norm())
        assert summary["per_tensor"][name]["rank"] == 4
        assert summary["per_tensor"][name]["error"] == pytest.approx(error, rel=1e-4)
        assert float((found[name] - whole).norm() / whole.norm()) == pytest.approx(error, rel=1e-3)
        lost, square = lost + float(s[4:].square().sum()), square + float(s.square().sum())
    assert summary["error"] == pytest.approx((lost / square) ** 0.5, rel=1e-4)
    assert json.loads((tmp_path / "adapter" / "merge.json").read_text())["error"] == summary["error"]


def test_any_method_with_a_rank(problem: Any, tmp_path: Path) -> None:
    base, adapters, _ = problem
    with pytest.raises(RecipeError, match=r"rank \(--rank\): must be given"):
        pymerge.merge(base, adapters, method="ties", as_adapter=True, out=tmp_path / "adapter")
    summary = pymerge.merge(base, adapters, method="ties", as_adapter=24, out=tmp_path / "adapter")
    pymerge.merge(base, adapters, method="ties", out=tmp_path / "whole")
    assert summary["error"] < 1e-3
    with open_checkpoint(tmp_path / "adapter") as model:
        for name, tensor in read_model(tmp_path / "whole").items():
            torch.testing.assert_close(model[name].load(), tensor, rtol=1e-4, atol=1e-5)


def test_extracts_matrices_by_factors_and_the_rest_whole(
    problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pymerge.engine.adapter_sink.ENTRIES", 7)
    base, _, factors = problem
    start = read_model(base)
    tuned = adapted(start, factors[0], dtype=torch.float32)
    for name in ("model.layers.0.norm.weight", "lm_head.weight"):
        tuned[name] = tuned[name] + 0.1
    model = write_model(tmp_path / "model", tuned)
    summary = extract(model, base, tmp_path / "adapter", 3)
    assert summary["whole"] == ["lm_head.weight", "model.layers.0.norm.weight"]
    assert (summary["r"], summary["matrices"]) == (3, 3)
    assert summary["error"] < 1e-3 and summary["left_out"] == {}  # the weights' rounding is in it
    with open_checkpoint(tmp_path / "adapter") as found:
        for name, tensor in tuned.items():
            torch.testing.assert_close(found[name].load(), tensor, rtol=1e-5, atol=1e-6)


def test_biases_beside_factors_are_named(tmp_path: Path) -> None:
    shapes = {"layers.0.q_proj.weight": (16, 12), "layers.0.q_proj.bias": (16,)}
    base = write_model(tmp_path / "base", random_tensors(0, shapes))
    model = write_model(tmp_path / "model", random_tensors(1, shapes))
    summary = extract(model, base, tmp_path / "adapter", 4)
    assert list(summary["left_out"]) == ["layers.0.q_proj.bias"] and summary["left_out"]["layers.0.q_proj.bias"] > 0.1


def test_a_disk_that_is_full_leaves_nothing(problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapters, _ = problem
    before = sorted(tmp_path.iterdir())

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=9, f_frsize=512))
        with pytest.raises(OutputError, match="while it is made, takes 6656 bytes, the disk has 4608 bytes free"):
            pymerge.merge(base, adapters, method="tsv_m", as_adapter=4, out=tmp_path / "adapter")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="is to become the adapter cannot be kept there: No space left"):
        pymerge.merge(base, adapters, method="tsv_m", as_adapter=4, out=tmp_path / "adapter")
    assert sorted(tmp_path.iterdir()) == before


def test_memory_is_planned_for_what_is_decomposed(problem: Any, tmp_path: Path) -> None:
    shapes = {f"layers.{i}.q_proj.weight": (1024, 1024) for i in range(2)}
    base = write_model(tmp_path / "wide", random_tensors(0, shapes))
    model = write_model(tmp_path / "model", random_tensors(1, shapes))
    held = decomposition_bytes(1024, 1024, 8)
    with pytest.raises(RecipeError, match=r"the update of layers.1.q_proj.weight \[1024, 1024\] needs 130 MB: raise"):
        extract(model, base, tmp_path / "out", 8, options=pymerge.Options(memory=held + 50_000_000))
    assert extract(model, base, tmp_path / "out", 8, options=pymerge.Options(memory=held + 70_000_000))["r"] == 8


def test_updates_in_tiles_give_the_same_adapter(tmp_path: Path) -> None:
    """Rooms on disk are used again for matrices, never for whole tensors: what is 0 there is not written."""
    shapes = {"embed_tokens.weight": (512, 4096)} | {f"layers.{i}.q_proj.weight": (512, 4096) for i in range(3)}
    start = random_tensors(0, shapes)
    tuned = {name: tensor + random_tensors(1, shapes)[name] for name, tensor in start.items()}
    tuned["embed_tokens.weight"] = start["embed_tokens.weight"].clone()
    tuned["embed_tokens.weight"][300:302] += 1.0
    base, model = write_model(tmp_path / "base", start), write_model(tmp_path / "model", tuned)
    written = []
    for memory in (decomposition_bytes(512, 4096, 4) + 70_000_000, 1_000_000_000):
        options = pymerge.Options(memory=memory, threads=2, overwrite=True)
        extract(model, base, tmp_path / "out", 4, options=options)
        written.append((tmp_path / "out" / "adapter_model.safetensors").read_bytes())
    assert written[0] == written[1]
    with open_checkpoint(tmp_path / "out") as found:
        torch.testing.assert_close(found["embed_tokens.weight"].load(), tuned["embed_tokens.weight"], rtol=0, atol=0)


def test_what_adapters_do_not_change_has_no_factors(problem: Any, tmp_path: Path) -> None:
    base, _, factors = problem
    for given in factors:
        for name in given:
            if "up_proj.lora_B" in name:
                given[name].zero_()
    adapters = [write_adapter(tmp_path / f"zero{t}", f, base) for t, f in enumerate(factors)]
    summary = pymerge.merge(base, adapters, method="task_arithmetic", as_adapter=True, out=tmp_path / "adapter")
    assert summary["matrices"] == 2
    with open_checkpoint(tmp_path / "adapter") as found:
        assert found.config is not None


@pytest.mark.slow
def test_memory_does_not_grow_with_the_adapter(tmp_path: Path) -> None:
    """The larger adapter takes 100 MB in float32."""
    peaks = []
    for count in (60, 600):
        shapes = {f"layers.{i}.q_proj.weight": (256, 256) for i in range(count)}
        base = write_model(tmp_path / f"base{count}", random_tensors(0, shapes))
        adapters = [write_adapter(tmp_path / f"{count}-{t}", random_factors(t, shapes, 42), base) for t in range(2)]
        call = f"pymerge.merge({str(base)!r}, {[*map(str, adapters)]}, method='task_arithmetic', as_adapter=True"
        call = f"{call}, out={str(tmp_path / f'out{count}')!r}, options=pymerge.Options(memory=200_000_000, threads=1))"
        code = f"import pymerge; from pymerge.engine.process import peak_memory; {call}; print(peak_memory())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 40e6, peaks


def test_refusals(problem: Any, tmp_path: Path) -> None:
    base, adapters, _ = problem
    with pytest.raises(RecipeError, match="a change of a base"):
        pymerge.merge(None, adapters, method="linear", as_adapter=4, out=tmp_path / "out")
    with pytest.raises(RecipeError, match="emr"):
        pymerge.merge(base, adapters, method="emr", as_adapter=4, out=tmp_path / "out")
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "one"}\n')
    given = {"method": "regmean_plusplus", "data": [data, data], "as_adapter": 4}
    with pytest.raises(RecipeError, match="write a whole model"):
        pymerge.merge(base, adapters, out=tmp_path / "out", **given)
    with pytest.raises(OutputError, match="inputs are never changed"):
        pymerge.merge(base, adapters, method="tsv_m", as_adapter=4, out=adapters[0])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "adapter_model.safetensors").touch()
    with pytest.raises(OutputError, match="holds a model already"):
        pymerge.merge(base, adapters, method="tsv_m", as_adapter=4, out=tmp_path / "full")
    with pytest.raises(RecipeError, match="at least 1"):
        pymerge.merge(base, adapters, method="tsv_m", as_adapter=0, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))


def test_same_bytes_whatever_the_threads_and_overwriting(problem: Any, tmp_path: Path) -> None:
    base, adapters, _ = problem
    written = []
    for threads in (1, 3):
        options = pymerge.Options(threads=threads, overwrite=True)
        pymerge.merge(base, adapters, method="tsv_m", as_adapter=5, out=tmp_path / "adapter", options=options)
        files = ("adapter_config.json", "adapter_model.safetensors")
        written.append([(tmp_path / "adapter" / file).read_bytes() for file in files])
    assert written[0] == written[1]
    assert not [path.name for path in tmp_path.iterdir() if "partial" in path.name or "replaced" in path.name]


def test_commands(problem: Any, tmp_path: Path) -> None:
    base, adapters, _ = problem
    recipe = tmp_path / "recipe.yaml"
    models = "".join(f"  - {{model: {path}}}\n" for path in adapters)
    recipe.write_text(f"merge_method: tsv_m\nbase_model: {base}\nmodels:\n{models}")
    run = CliRunner().invoke
    done = run(app, ["merge", str(recipe), str(tmp_path / "a"), "--as-adapter", "--rank", "4"])
    assert done.exit_code == 0 and "adapter of rank 4, 3 matrices" in done.output, done.output
    done = run(app, ["verify", str(tmp_path / "a")])
    assert done.exit_code == 3 and isinstance(done.exception, SystemExit), done.output
    assert run(app, ["merge", str(recipe), str(tmp_path / "whole")]).exit_code == 0
    assert run(app, ["merge", str(recipe), str(tmp_path / "b"), "--rank", "4"]).exit_code == 2
    done = run(app, ["extract-lora", str(tmp_path / "whole"), str(base), "-r", "7", "-o", str(tmp_path / "c")])
    assert done.exit_code == 0 and "adapter of rank 7" in done.output, done.output


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, and two adapters that PEFT has made, of different targets, ranks and scales."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llama")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, vocab_size=64)).save_pretrained(folder / "base")
    settings: list[dict[str, Any]] = [
        {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        {
            "r": 3,
            "lora_alpha": 4,
            "use_rslora": True,
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"layers.1.*.up_proj": 8},
            "modules_to_save": ["lm_head"],
        },
    ]
    for t, setting in enumerate(settings):
        model = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **setting))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    p.add_(0.1 * torch.randn_like(p))
        model.save_pretrained(folder / f"adapter{t}")
        model.merge_and_unload().save_pretrained(folder / f"merged{t}")
    return folder


@pytest.mark.parametrize("number", [0, 1])
def test_an_adapter_is_what_peft_merges(number: int, llama: Path) -> None:
    with open_checkpoint(llama / f"adapter{number}") as model:
        expected = read_model(llama / f"merged{number}")
        assert sorted(model) == sorted(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(model[name].load(), tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv_m", "knots", "core_space"])
def test_peft_loads_the_result(method: str, llama: Path, tmp_path: Path) -> None:
    import peft
    import transformers

    base, adapters = llama / "base", [llama / "adapter0", llama / "adapter1"]
    pymerge.merge(base, adapters, method=method, as_adapter=True, out=tmp_path / "adapter")
    pymerge.merge(base, adapters, method=method, out=tmp_path / "whole")
    loaded = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter")
    found = loaded.merge_and_unload().state_dict()
    for name, tensor in read_model(tmp_path / "whole").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


def test_peft_loads_what_is_extracted(llama: Path, tmp_path: Path) -> None:
    import peft
    import transformers

    extract(llama / "merged1", llama / "base", tmp_path / "adapter", 3)
    base = transformers.LlamaForCausalLM.from_pretrained(llama / "base")
    found = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, tensor in read_model(llama / "merged1").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_base_has_nothing_to_extract(problem: Any, tmp_path: Path) -> None:
    base, _, _ = problem
    with pytest.raises(RecipeError, match="is the base itself: there is nothing to extract"):
        extract(f"{base}/", base, tmp_path / "out", 4)
