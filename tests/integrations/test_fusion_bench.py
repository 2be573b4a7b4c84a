"""pymerge in FusionBench: the algorithm class, its configs, and FusionBench's own command line.

`make test-fusion-bench` runs them in an environment with FusionBench."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("fusion_bench", reason="FusionBench is not installed: make test-fusion-bench")

from fusion_bench import BaseModelPool
from fusion_bench import method as theirs
from fusion_bench.modelpool import CausalLMPool, CLIPVisionModelPool
from fusion_bench.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, GPT2Config, GPT2LMHeadModel

import pymerge
from pymerge.integrations import fusion_bench as adapter
from pymerge.integrations.fusion_bench import PymergeAlgorithm
from tests.integrations.fusion_bench_configs import FOLDER, packaged
from tests.integrations.fusion_bench_pool import Images, Texts, Vectors, net
from tests.methods.plugin_packages import install

ROOT = Path(__file__).parents[2]
HERE = "tests.integrations.fusion_bench_pool"


def states(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def datasets(kind):
    return OmegaConf.create({name: {"_target_": f"{HERE}.{kind}", "seed": i} for i, name in enumerate("ab")})


def save_models(model, folder):
    """A base and two tasks in folders; returns the pool's mapping."""
    names = {"_pretrained_": str(folder / "base")}
    model.save_pretrained(folder / "base")
    for seed, name in enumerate("ab", 1):
        generator = torch.Generator().manual_seed(seed)
        task = type(model).from_pretrained(folder / "base")
        with torch.no_grad():
            for p in task.parameters():
                p += 0.02 * torch.randn(p.shape, generator=generator)
        task.save_pretrained(folder / name)
        names[name] = str(folder / name)
    return names


def clip(folder):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return save_models(CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, **shape)), folder)


def gpt2(folder):
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    return save_models(GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=1, **shape)), folder)


@pytest.fixture
def models():
    return {"_pretrained_": net(0), "a": net(1), "b": net(2)}


@pytest.fixture
def pool(models):
    return BaseModelPool(models, train_datasets=datasets("Vectors"))


def observed(models, samples=32):
    found = []
    for i, name in enumerate("ab"):
        x = Vectors(i).x
        found.append(pymerge.observe(models[name], x[[j * 40 // samples for j in range(samples)]].split(8)))
    return found


def expected_of(name, models, fisher):
    """pymerge.merge of the pool with its own defaults."""
    info, arguments = pymerge.methods.describe(name), {}
    if "covariance" in info.needs:
        arguments["statistics"] = observed(models)
    if "fisher" in info.needs:
        arguments["fisher"] = fisher
    if name in ("slerp", "nearswap"):
        arguments["t"] = 0.3
    if info.step != "combine":
        arguments[info.step] = name
        name = "task_arithmetic"
    base = models["_pretrained_"] if info.base in ("required", "optional") else None
    return pymerge.merge(base, [models["a"], models["b"]], method=name, **arguments).state_dict()


@pytest.mark.parametrize("name", [name for name in packaged() if name != "regmean_plusplus"])  # see the lazy pools
def test_packaged_config_merges_as_pymerge_does(name, models, pool, tmp_path):
    before = {key: states(model) for key, model in models.items()}
    config = OmegaConf.load(FOLDER / f"{name}.yaml")
    fisher = [str(tmp_path / f"{task}.safetensors") for task in "ab"]
    for path, task in zip(fisher, "ab", strict=True):
        save_file({key: value.square() for key, value in models[task].state_dict().items()}, path)
    if name in ("slerp", "nearswap"):
        config.t = 0.3
    if name == "fisher":
        config.fisher = fisher
    merged = instantiate(config).run(pool)
    assert_same(merged.state_dict(), expected_of(name, models, fisher))
    for key, model in models.items():
        assert merged is not model
        assert_same(states(model), before[key])


def test_a_dict_of_modules_is_a_pool(models):
    merged = PymergeAlgorithm("task_arithmetic", scale=0.5, weight=[0.25, 0.75]).run(models)
    base, a, b = (models[name].head.weight for name in ("_pretrained_", "a", "b"))
    torch.testing.assert_close(merged.head.weight, base + 0.5 * (0.25 * (a - base) + 0.75 * (b - base)))


def test_excluded_tensors_stay_as_in_the_base(models):
    merged = PymergeAlgorithm("linear", exclude_keys=["head.*"]).run(models)
    assert torch.equal(merged.head.weight, models["a"].head.weight)  # linear has no base: the first model's
    merged = PymergeAlgorithm("tsv_m", exclude_keys=["*.bias", "head.*"]).run(models)
    base = models["_pretrained_"]
    same = {name for name, tensor in merged.state_dict().items() if torch.equal(tensor, base.state_dict()[name])}
    assert same == {"body.0.bias", "body.2.bias", "head.weight", "head.bias"}


def test_only_target_modules_are_merged():
    models = {"_pretrained_": net(0, classes=3), "a": net(1, classes=4), "b": net(2, classes=5)}
    for model in models.values():
        model._fusion_bench_target_modules = ["body"]
    pool = BaseModelPool(models, train_datasets=datasets("Vectors"))
    merged = PymergeAlgorithm("regmean").run(pool)
    bodies = [models[name].body for name in ("_pretrained_", "a", "b")]
    inputs = [Vectors(i).x[[j * 40 // 32 for j in range(32)]] for i in range(2)]
    statistics = [pymerge.observe(body, [x]) for body, x in zip(bodies[1:], inputs, strict=True)]
    expected = pymerge.merge(bodies[0], bodies[1:], method="regmean", statistics=statistics)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(merged.body.state_dict()[name], tensor)
    assert_same(merged.head.state_dict(), models["_pretrained_"].head.state_dict())


def test_samples_are_spread_over_the_dataset(models, pool):
    merged = PymergeAlgorithm("regmean", samples=4, batch_size=3).run(pool)
    expected = pymerge.merge(
        models["_pretrained_"], [models["a"], models["b"]], method="regmean", statistics=observed(models, samples=4)
    )
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor)


def test_statistics_from_files_need_no_datasets(models, tmp_path):
    files = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    statistics = observed(models)
    for path, found in zip(files, statistics, strict=True):
        found.save(path)
    merged = PymergeAlgorithm("regmean", statistics=files).run(models)
    expected = pymerge.merge(
        models["_pretrained_"], [models["a"], models["b"]], method="regmean", statistics=statistics
    )
    assert_same(merged.state_dict(), expected.state_dict())


@pytest.mark.parametrize("lazy", [False, True], ids=["loaded", "lazy"])
def test_texts_are_padded_and_padding_left_out(lazy, tmp_path):
    names = gpt2(tmp_path)
    pool = CausalLMPool(names, tokenizer=None, enable_lazy_loading=lazy, train_datasets=datasets("Texts"))
    merged = PymergeAlgorithm("task_arithmetic", purify="pave", batch_size=4).run(pool)
    statistics = []
    for i, name in enumerate("ab"):
        one_by_one = [{"input_ids": torch.tensor([ids])} for ids in Texts(i).ids]
        statistics.append(pymerge.observe(names[name], one_by_one))
    pymerge.merge(
        names["_pretrained_"],
        [names["a"], names["b"]],
        method="task_arithmetic",
        purify="pave",
        statistics=statistics,
        out=tmp_path / "merged",
    )
    assert isinstance(merged, GPT2LMHeadModel)
    for name, tensor in load_file(tmp_path / "merged/model.safetensors").items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, atol=1e-5, rtol=1e-5)
    assert merged.lm_head.weight is merged.transformer.wte.weight


def test_models_of_lazy_pools_are_observed_while_they_are_merged(tmp_path):
    names = gpt2(tmp_path)
    pool = CausalLMPool(names, tokenizer=None, enable_lazy_loading=True, train_datasets=datasets("Texts"))
    merged = instantiate(OmegaConf.load(FOLDER / "regmean_plusplus.yaml")).run(pool)
    data = []
    for i in range(2):
        ids = torch.zeros(6, 8, dtype=torch.int64)
        for row, text in zip(ids, Texts(i).ids, strict=True):
            row[: len(text)] = torch.tensor(text)
        data.append({"input_ids": ids, "attention_mask": (ids > 0).long()})
    tasks = [names["a"], names["b"]]
    pymerge.merge(names["_pretrained_"], tasks, method="regmean_plusplus", data=data, out=tmp_path / "merged")
    expected = load_file(tmp_path / "merged/model.safetensors")
    assert_same({name: merged.state_dict()[name] for name in expected}, expected)
    with pytest.raises(pymerge.MergeError, match="regmean_plusplus observes the models while they are merged"):
        loaded = CausalLMPool(names, tokenizer=None, train_datasets=datasets("Texts"))
        PymergeAlgorithm("regmean_plusplus").run(loaded)


def test_images_go_through_the_pools_processor(tmp_path):
    names = clip(tmp_path)
    processor = {"_target_": "transformers.CLIPImageProcessor", "size": 16, "crop_size": 16}
    pool = CLIPVisionModelPool(
        OmegaConf.create(names), processor=OmegaConf.create(processor), train_datasets=datasets("Images")
    )
    merged = PymergeAlgorithm("esm").run(pool)
    statistics = []
    for i, name in enumerate("ab"):
        pictures = [Images(i)[j]["image"] for j in range(4)]
        pixels = pool.load_processor()(images=pictures, return_tensors="pt")["pixel_values"]
        statistics.append(pymerge.observe(pool.load_model(name), [pixels]))
    base, *tasks = (pool.load_model(name) for name in ("_pretrained_", "a", "b"))
    assert_same(merged.state_dict(), pymerge.merge(base, tasks, method="esm", statistics=statistics).state_dict())


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        (lambda: theirs.SimpleAverageAlgorithm(), {"merge_method": "linear"}),
        (lambda: theirs.TaskArithmeticAlgorithm(scaling_factor=0.4), {"merge_method": "task_arithmetic", "scale": 0.4}),
        (
            lambda: theirs.TiesMergingAlgorithm(scaling_factor=0.5, threshold=20, merge_func="sum", remove_keys=[]),
            {"merge_method": "ties", "scale": 0.5, "merge_func": "sum"},
        ),
        (lambda: theirs.ISO_C_Merge(scaling_factor=1.0, exclude_keys=None), {"merge_method": "iso_c"}),
        (lambda: theirs.TaskSingularVectorMerging(alpha=1.0, exclude_keys=None), {"merge_method": "tsv_m"}),
    ],
    ids=["average", "task_arithmetic", "ties", "iso_c", "tsv_m"],
)
def test_agrees_with_fusion_bench(algorithm, arguments, tmp_path):
    pool = CLIPVisionModelPool(OmegaConf.create(clip(tmp_path)))
    if arguments["merge_method"] in ("iso_c", "tsv_m"):  # FusionBench decomposes every 2-D tensor
        arguments = arguments | {"spectral": {"include": ["*.position_embedding.weight"]}}
    base = pool.load_pretrained_model().state_dict()
    got, expected = PymergeAlgorithm(**arguments).run(pool).state_dict(), algorithm().run(pool).state_dict()
    for name, tensor in expected.items():
        assert (got[name] - tensor).norm() <= 1e-4 * (tensor - base[name]).norm(), name


def test_merges_on_the_device_of_fabric(models, monkeypatch):
    given = {}
    monkeypatch.setattr(adapter, "merge", lambda **arguments: given.update(arguments) or {})
    algorithm = PymergeAlgorithm("ties")
    algorithm._fabric_instance = SimpleNamespace(device=torch.device("cuda", 1), _loggers=[])
    algorithm.run(models)
    assert given["options"].device == "cuda:1"


def test_wrong_options_are_found_before_models_are_run(models):
    unused = OmegaConf.create({name: {"_target_": f"{HERE}.Untouchable"} for name in "ab"})
    pool = BaseModelPool(models, train_datasets=unused)
    with pytest.raises(pymerge.MergeError, match="alhpa"):
        PymergeAlgorithm("regmean", alhpa=0.5).run(pool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"merge_method": "regmean", "dataset": "test"}, "the pool has test datasets .*, none for a"),
        ({"merge_method": "regmean", "dataset": "dev"}, "one of train, val, test"),
        ({"merge_method": "tsvm"}, "did you mean"),
        ({"merge_method": "emr"}, "leaves masks beside"),
        ({"merge_method": "knots"}, "merges LoRA adapters"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_said(arguments, message, pool):
    with pytest.raises(pymerge.MergeError, match=message):
        PymergeAlgorithm(**arguments).run(pool)


def test_datasets_of_all_tasks_are_there_before_models_are_run(models):
    only_a = OmegaConf.create({"a": {"_target_": f"{HERE}.Vectors", "seed": 0}})
    models["a"].register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(pymerge.MergeError, match="none for b"):
        PymergeAlgorithm("regmean").run(BaseModelPool(models, train_datasets=only_a))


def test_a_pool_without_tasks_is_refused(models):
    with pytest.raises(pymerge.MergeError, match="no models to merge"):
        PymergeAlgorithm("ties").run({"_pretrained_": models["_pretrained_"]})


def test_a_pool_without_a_base_is_refused_where_one_is_needed(models):
    del models["_pretrained_"]
    with pytest.raises(pymerge.MergeError, match="_pretrained_"):
        PymergeAlgorithm("ties").run(models)


def test_config_survives_yaml(models, tmp_path):
    algorithm = PymergeAlgorithm("ties", exclude_keys=["head.*"], density=0.5, weight=[1.0, 2.0], calibrate="lines")
    algorithm.to_yaml(tmp_path / "method.yaml")
    again = PymergeAlgorithm.from_yaml(tmp_path / "method.yaml")
    assert again.parameters == algorithm.parameters == {"density": 0.5, "weight": [1.0, 2.0], "calibrate": "lines"}
    assert_same(again.run(models).state_dict(), algorithm.run(models).state_dict())


def test_command_line(tmp_path):
    names = clip(tmp_path)
    listed = ", ".join(f"{name}: {path}" for name, path in names.items())
    command = [
        Path(sys.executable).with_name("fusion_bench"),
        "method=pymerge/tsv_m",
        "method.scale=0.5",
        "method.exclude_keys=['*.bias']",
        "modelpool=CLIPVisionModelPool/_template",
        f"modelpool.models={{{listed}}}",
        "fabric.accelerator=cpu",
        "merged_model_save_path=merged",
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    pymerge.merge(
        names["_pretrained_"],
        [names["a"], names["b"]],
        method="tsv_m",
        scale=0.5,
        exclude=["*.bias"],
        out=tmp_path / "expected",
    )
    assert_same(load_file(tmp_path / "merged/model.safetensors"), load_file(tmp_path / "expected/model.safetensors"))


def test_command_line_finds_methods_of_other_packages(tmp_path):
    names = clip(tmp_path)
    install(tmp_path / "installed", "half-merge", {"half": "half_merge:Half"})
    command = [
        Path(sys.executable).with_name("fusion_bench"),
        "method=pymerge/half",
        "method.weight=[1,2]",
        "method.purify={method: trim, density: 0.5}",
        "modelpool=CLIPVisionModelPool/_template",
        f"modelpool.models={{{', '.join(f'{name}: {path}' for name, path in names.items())}}}",
        "fabric.accelerator=cpu",
        "merged_model_save_path=merged",
    ]
    path = f"{tmp_path / 'installed'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    pymerge.merge(
        names["_pretrained_"],
        [names["a"], names["b"]],
        method="task_arithmetic",
        scale=0.5,
        weight=[1, 2],
        purify={"method": "trim", "density": 0.5},
        out=tmp_path / "expected",
    )
    assert_same(load_file(tmp_path / "merged/model.safetensors"), load_file(tmp_path / "expected/model.safetensors"))
