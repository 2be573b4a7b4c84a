"""Models of several components are merged component by component into one folder of the same make."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.errors import (
    AmbiguousModel,
    CorruptFile,
    InputError,
    MissingTensor,
    RecipeError,
    UnsafeFile,
    UnsafePath,
    UnsupportedDtype,
)
from tests.components import (
    DIFFUSERS,
    ENCODER,
    FILES,
    INDEX,
    MODULES,
    Model,
    flat,
    random_model,
    same_bits,
    tuned_model,
    write_encoder,
    write_json,
    write_pipeline,
)
from tests.models import interrupted_after

MERGE = {"method": "task_arithmetic", "weight": [0.5, 0.25], "scale": 1.0}


@pytest.fixture
def models() -> list[Model]:
    base = random_model(0)
    return [base, tuned_model(base, 10), tuned_model(base, 20)]


@pytest.fixture
def folders(tmp_path: Path, models: list[Model]) -> list[str]:
    return [str(write_pipeline(tmp_path / str(i), model)) for i, model in enumerate(models)]


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def written(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors below a folder, read by the safetensors library."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        component = path.parent.relative_to(folder).as_posix()
        found |= {name if component == "." else f"{component}/{name}": t for name, t in load_file(path).items()}
    return found


def in_memory(models: list[Model], **arguments: object) -> dict[str, torch.Tensor]:
    base, *tuned = map(flat, models)
    return pymerge.merge(base, tuned, **{**MERGE, **arguments})


def test_a_pipeline_is_merged_into_a_pipeline(folders, models, tmp_path):
    out = tmp_path / "out"
    summary = pymerge.merge(folders[0], folders[1:], **MERGE, out=out)
    assert same_bits(written(out), in_memory(models))
    assert tree(out) == sorted([*tree(Path(folders[0])), "README.md", "merge.json"])
    for name in ("model_index.json", "unet/config.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"):
        assert (out / name).read_bytes() == Path(folders[0], name).read_bytes()
    assert (
        set(summary["checksums"]) == set(flat(models[0]))
        and "library_name: diffusers" in (out / "README.md").read_text()
    )
    assert pymerge.verify(out) == {"tensors": 7, "bytes": sum(t.nbytes for t in written(out).values())}


def test_a_sentence_encoder_is_merged_with_its_dense_layer(tmp_path):
    base = random_model(0, ENCODER)
    models = [base, tuned_model(base, 10), tuned_model(base, 20)]
    folders = [str(write_encoder(tmp_path / str(i), model)) for i, model in enumerate(models)]
    summary = pymerge.merge(folders[0], folders[1:], **MERGE, dtype="bfloat16", out=tmp_path / "out")
    assert same_bits(written(tmp_path / "out"), in_memory(models, dtype="bfloat16"))
    assert tree(tmp_path / "out") == sorted([*tree(Path(folders[0])), "README.md", "merge.json"])
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert json.loads((tmp_path / "out/2_Dense/config.json").read_text()) == {"in_features": 8, "out_features": 4}
    assert "2_Dense/linear.weight" in summary["checksums"] and not any("not merged" in n for n in summary["notes"])
    assert pymerge.verify(tmp_path / "out")["tensors"] == 4


def test_an_encoder_whose_transformer_has_a_folder_of_its_own(tmp_path):
    modules = [dict(MODULES[0], path="0_Transformer"), *MODULES[1:]]
    base = {"0_Transformer" if not name else name: own for name, own in random_model(0, ENCODER).items()}
    models = [base, tuned_model(base, 10)]
    for i, model in enumerate(models):
        (tmp_path / str(i) / "0_Transformer").mkdir(parents=True)
        write_encoder(tmp_path / str(i), model)
        (tmp_path / str(i) / "config.json").rename(tmp_path / str(i) / "0_Transformer/config.json")
        write_json(tmp_path / str(i) / "modules.json", modules)
    pymerge.merge(
        str(tmp_path / "0"), [str(tmp_path / "1")], method="task_arithmetic", out_dtype="float16", out=tmp_path / "out"
    )
    expected = pymerge.merge(flat(models[0]), [flat(models[1])], method="task_arithmetic", out_dtype="float16")
    assert same_bits(written(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out/0_Transformer/config.json").read_text())["torch_dtype"] == "float16"


def test_patterns_and_filters_see_the_component(folders, models, tmp_path):
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": folders[0],
        "models": [
            {"model": folders[1], "parameters": {"weight": [{"filter": "text_encoder/", "value": 0.5}, {"value": 1}]}}
        ],
        "exclude": ["vae/*"],
    }
    pymerge.Recipe.from_dict(recipe).run(tmp_path / "out")
    base, tuned = flat(models[0]), flat(models[1])
    for name, tensor in written(tmp_path / "out").items():
        weight = {"vae": 0.0, "text_encoder": 0.5, "unet": 1.0}[name.partition("/")[0]]
        torch.testing.assert_close(tensor, base[name] + weight * (tuned[name] - base[name]), rtol=0, atol=1e-6)
        assert weight or torch.equal(tensor, base[name])


def test_layers_are_counted_in_each_component(folders, models, tmp_path):
    recipe = {"merge_method": "task_arithmetic", "base_model": folders[0], "models": [{"model": folders[1]}]}
    pymerge.Recipe.from_dict(recipe | {"parameters": {"weight": [0, 1]}}).run(tmp_path / "out")
    found, base, tuned = written(tmp_path / "out"), flat(models[0]), flat(models[1])
    assert torch.equal(found["unet/down_blocks.0.to_q.weight"], base["unet/down_blocks.0.to_q.weight"])
    for name in ("unet/down_blocks.1.to_q.weight", "text_encoder/text_model.layers.0.fc.weight"):
        torch.testing.assert_close(found[name], tuned[name])


def test_methods_for_matrices_choose_by_name_below_the_component(tmp_path):
    shapes = {"unet": {"fc.weight": (12, 8)}, "text_encoder": {"shared.weight": (12, 8)}}
    base = random_model(0, shapes)
    models = [base, tuned_model(base, 10), tuned_model(base, 20)]
    index = {key: INDEX[key] for key in ("_class_name", "unet", "text_encoder")}
    folders = [str(write_pipeline(tmp_path / str(i), model, index)) for i, model in enumerate(models)]
    summary = pymerge.merge(folders[0], folders[1:], method="tsv_m", out=tmp_path / "out")
    assert list(summary["per_tensor"]) == ["unet/fc.weight"]
    names = {"unet/fc.weight": "fc.weight", "text_encoder/shared.weight": "shared.weight"}
    plain = [{names[name]: t for name, t in flat(model).items()} for model in models]
    expected = pymerge.merge(plain[0], plain[1:], method="tsv_m")
    assert same_bits({names[name]: t for name, t in written(tmp_path / "out").items()}, expected)


def test_shards_of_each_component_have_their_own_index(folders, models, tmp_path):
    options = pymerge.Options(shard_bytes=1000)
    pymerge.merge(folders[0], folders[1:], **MERGE, out=tmp_path / "out", options=options)
    index = json.loads((tmp_path / "out/unet" / f"{DIFFUSERS}.index.json").read_text())
    assert set(index["weight_map"]) == set(models[0]["unet"])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in models[0]["unet"].values())
    assert (tmp_path / "out/unet/diffusion_pytorch_model-00001-of-00003.safetensors").exists()
    assert (tmp_path / "out/text_encoder/model-00001-of-00002.safetensors").exists() and (
        tmp_path / "out/vae" / DIFFUSERS
    ).exists()
    assert same_bits(written(tmp_path / "out"), in_memory(models))
    again = pymerge.merge(str(tmp_path / "out"), folders[1:], **MERGE, out=tmp_path / "again")  # shards are read too
    assert set(again["checksums"]) == set(flat(models[0]))


def test_an_interrupted_merge_continues(folders, models, tmp_path, monkeypatch):
    out, staging = tmp_path / "out", tmp_path / "out.partial"
    with interrupted_after(4):
        pymerge.merge(folders[0], folders[1:], **MERGE, out=out)
    assert (staging / "unet" / DIFFUSERS).exists() and not (staging / "unet/config.json").exists() and not out.exists()
    (staging / "unet/stray.safetensors").write_bytes(b"left over")
    (staging / "old").mkdir()
    before = os.stat(staging / "unet" / DIFFUSERS).st_ino
    pymerge.merge(folders[0], folders[1:], **MERGE, out=out)
    assert os.stat(out / "unet" / DIFFUSERS).st_ino == before
    assert same_bits(written(out), in_memory(models)) and not (out / "old").exists()


def test_verify_finds_a_changed_component(folders, tmp_path):
    pymerge.merge(folders[0], folders[1:], **MERGE, out=tmp_path / "out")
    path = tmp_path / "out/vae" / DIFFUSERS
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptFile, match=r"vae/decoder.conv.\w+: checksum"):
        pymerge.verify(tmp_path / "out")


def test_a_search_over_the_scale(folders, models, tmp_path):
    def distance(folder: str) -> float:
        return -float((written(Path(folder))["unet/conv_in.weight"] - wanted).norm())

    wanted = in_memory(models, scale=0.5)["unet/conv_in.weight"]
    recipe = {"merge_method": "task_arithmetic", "base_model": folders[0]}
    recipe |= {
        "models": [{"model": f, "parameters": {"weight": w}} for f, w in zip(folders[1:], (0.5, 0.25), strict=True)]
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    pymerge.search(tmp_path / "recipe.yaml", distance, {"scale": [0.25, 0.5, 1.0]}, out=tmp_path / "best")
    assert same_bits(written(tmp_path / "best"), in_memory(models, scale=0.5))
    assert (tmp_path / "best/model_index.json").exists()


def rename(folder: str, old: str, new: str) -> None:
    Path(folder, old).rename(Path(folder, new))


@pytest.mark.parametrize("variant", [f"{DIFFUSERS[:-12]}.fp16.safetensors", f"{DIFFUSERS[:-12]}.non_ema.safetensors"])
def test_a_variant_is_read_where_there_is_nothing_else(folders, models, tmp_path, variant):
    for folder in folders:
        rename(folder, f"unet/{DIFFUSERS}", f"unet/{variant}")
    pymerge.merge(folders[0], folders[1:], **MERGE, out=tmp_path / "out")
    assert same_bits(written(tmp_path / "out"), in_memory(models)) and (tmp_path / "out/unet" / DIFFUSERS).exists()


def test_variants_beside_the_weights_are_left_out(folders, models, tmp_path):
    save_file({"other": torch.zeros(1)}, Path(folders[0], "unet/diffusion_pytorch_model.fp16.safetensors"))
    summary = pymerge.merge(folders[0], folders[1:], **MERGE, out=tmp_path / "out")
    assert same_bits(written(tmp_path / "out"), in_memory(models))
    assert any("not copied from the base: unet/diffusion_pytorch_model.fp16.safetensors" in n for n in summary["notes"])


def test_a_sharded_variant(folders, models, tmp_path):
    unet, names = Path(folders[1], "unet"), list(models[1]["unet"])
    (unet / DIFFUSERS).unlink()
    files = {name: f"diffusion_pytorch_model.fp16-{i:05d}-of-00003.safetensors" for i, name in enumerate(names, 1)}
    for name, file in files.items():
        save_file({name: models[1]["unet"][name]}, unet / file)
    write_json(unet / f"{DIFFUSERS}.index.fp16.json", {"weight_map": files})
    pymerge.merge(folders[0], folders[1:], **MERGE, out=tmp_path / "out")
    assert same_bits(written(tmp_path / "out"), in_memory(models))


def test_one_component_alone(folders, models, tmp_path):
    unets = [f"{folder}/unet" for folder in folders]
    pymerge.merge(unets[0], unets[1:], **MERGE, dtype="float16", out=tmp_path / "out")
    expected = in_memory([{"": model["unet"]} for model in models], dtype="float16")
    assert same_bits(load_file(tmp_path / "out" / DIFFUSERS), expected)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"_class_name": "UNet2DConditionModel"}


def test_one_file_of_a_component_is_no_folder_of_several(tmp_path):
    base = random_model(0, ENCODER)
    folders = [write_encoder(tmp_path / str(i), model) for i, model in enumerate((base, tuned_model(base, 1)))]
    files = [str(folder / "model.safetensors") for folder in folders]
    pymerge.merge(files[0], files[1:], method="task_arithmetic", out=tmp_path / "out")
    assert set(written(tmp_path / "out")) == set(base[""]) and not (tmp_path / "out/modules.json").exists()


def without(index: dict, *names: str) -> dict:
    return {key: value for key, value in index.items() if key not in names}


def test_components_that_only_some_models_have(folders, models, tmp_path):
    write_pipeline(tmp_path / "less", {k: v for k, v in models[1].items() if k != "vae"}, without(INDEX, "vae"))
    less, out = str(tmp_path / "less"), tmp_path / "out"
    with pytest.raises(
        InputError, match=rf'^component vae: diffusers.AutoencoderKL in base, absent in {less}: exclude: \["vae/\*"\]'
    ):
        pymerge.merge(folders[0], [less], method="task_arithmetic", out=out)
    with pytest.raises(InputError, match=rf"^component vae: absent in base, diffusers.AutoencoderKL in {folders[0]}"):
        pymerge.merge(less, folders[:1], method="task_arithmetic", out=out)
    pymerge.merge(folders[0], [less], method="task_arithmetic", exclude=["vae/*"], out=out)
    assert same_bits(load_file(out / "vae" / DIFFUSERS), models[0]["vae"])
    with pytest.raises(InputError, match=r"relax: \{extra: drop\}"):
        pymerge.merge(less, folders[:1], method="task_arithmetic", relax={"extra": "copy"}, out=tmp_path / "copied")
    pymerge.merge(less, folders[:1], method="task_arithmetic", relax={"extra": "drop"}, out=tmp_path / "dropped")
    assert not (tmp_path / "dropped/vae").exists()


def test_components_of_other_classes(folders, models, tmp_path):
    index = INDEX | {"unet": ["diffusers", "UNet2DModel"]}
    other = str(write_pipeline(tmp_path / "other", models[1], index))
    with pytest.raises(
        InputError, match="^component unet: diffusers.UNet2DConditionModel in base, diffusers.UNet2DModel in"
    ):
        pymerge.merge(folders[0], [other], method="task_arithmetic", out=tmp_path / "out")


def test_a_plain_model_among_pipelines(folders, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file({"w": torch.zeros(1)}, plain / "model.safetensors")
    with pytest.raises(InputError, match=f"component unet: diffusers.UNet2DConditionModel in base, absent in {plain}"):
        pymerge.merge(folders[0], [str(plain)], method="task_arithmetic", out=tmp_path / "out")


def test_tensors_that_differ_are_named_with_their_component(folders, models, tmp_path):
    save_file({"decoder.conv.weight": models[1]["vae"]["decoder.conv.weight"]}, Path(folders[1], "vae", DIFFUSERS))
    with pytest.raises(MissingTensor, match="^vae/decoder.conv.bias: in base, absent from"):
        pymerge.merge(folders[0], folders[1:], **MERGE, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (
            lambda f: rename(f, f"unet/{DIFFUSERS}", "unet/model.onnx"),
            InputError,
            "weights under names .* unet/model.onnx",
        ),
        (
            lambda f: rename(f, f"unet/{DIFFUSERS}", "unet/diffusion_pytorch_model.bin"),
            UnsafeFile,
            "unet/.*bin: pickled",
        ),
        (lambda f: rename(f, "vae", "gone"), InputError, "lists vae .diffusers.AutoencoderKL., which is not there"),
        (lambda f: write_json(Path(f, "model_index.json"), INDEX | {"../x": ["a", "B"]}), UnsafePath, "'../x'"),
        (lambda f: Path(f, "model_index.json").write_text("[]"), CorruptFile, "expected a JSON object"),
        (lambda f: write_json(Path(f, f"unet/{DIFFUSERS}.index.json"), {"weight_map": {}}), AmbiguousModel, "stale"),
        (
            lambda f: shutil.copy(f"{f}/unet/{DIFFUSERS}", f"{f}/unet/model.safetensors"),
            AmbiguousModel,
            "holds model.saf",
        ),
    ],
    ids=["onnx", "pickle", "folder", "path", "list", "index", "two"],
)
def test_folders_that_are_refused(folders, tmp_path, change, error, says):
    change(folders[0])
    with pytest.raises(error, match=says):
        pymerge.merge(folders[0], folders[1:], **MERGE, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_two_variants_and_nothing_without_one(folders, tmp_path):
    rename(folders[0], f"unet/{DIFFUSERS}", "unet/diffusion_pytorch_model.fp16.safetensors")
    save_file({"w": torch.zeros(1)}, Path(folders[0], "unet/diffusion_pytorch_model.non_ema.safetensors"))
    with pytest.raises(AmbiguousModel, match="variants fp16, non_ema and no weights without one"):
        pymerge.merge(folders[0], folders[1:], **MERGE, out=tmp_path / "out")


def test_an_adapter_is_of_one_component(folders, tmp_path):
    with pytest.raises(RecipeError, match="an adapter is of one model: merge the folder of one component .*unet"):
        pymerge.merge(folders[0], folders[1:], **MERGE, as_adapter=4, out=tmp_path / "out")


def test_a_pickled_component_is_read_where_it_is_allowed(folders, models, tmp_path):
    assert set(FILES) == set(models[0])
    torch.save(models[1]["vae"], Path(folders[1], "vae/diffusion_pytorch_model.bin"))
    Path(folders[1], "vae", DIFFUSERS).unlink()
    options = pymerge.Options(allow_pickle=True)
    pymerge.merge(folders[0], folders[1:], **MERGE, out=tmp_path / "out", options=options)
    assert same_bits(written(tmp_path / "out"), in_memory(models))


def test_exports_inside_a_component_are_left_out(tmp_path):
    modules = [dict(MODULES[0], path="0_Transformer"), *MODULES[1:]]
    base = {"0_Transformer" if not name else name: own for name, own in random_model(0, ENCODER).items()}
    (tmp_path / "a/0_Transformer/onnx").mkdir(parents=True)
    write_encoder(tmp_path / "a", base)
    write_json(tmp_path / "a/modules.json", modules)
    (tmp_path / "a/0_Transformer/onnx/model.onnx").write_bytes(b"x")
    summary = pymerge.merge(None, [str(tmp_path / "a")], method="linear", out=tmp_path / "out")
    assert same_bits(written(tmp_path / "out"), flat(base))
    assert not (tmp_path / "out/0_Transformer/onnx").exists()
    assert any("not copied from the base: " in n and "0_Transformer/onnx/model.onnx" in n for n in summary["notes"])


def test_a_tensor_named_like_another_components_is_refused(tmp_path):
    base = random_model(0, ENCODER)
    base[""]["2_Dense/linear.weight"] = torch.zeros(1)
    with pytest.raises(
        InputError, match="2_Dense/linear.weight in model.safetensors is named like another component's"
    ):
        pymerge.open_checkpoint(write_encoder(tmp_path / "a", base))


def test_tensors_of_plain_models_may_have_slashes(tmp_path):
    tensors = {"/w": torch.ones(400), "unet/w": torch.ones(400)}
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a/model.safetensors")
    pymerge.merge(
        None, [str(tmp_path / "a")], method="linear", out=tmp_path / "out", options=pymerge.Options(shard_bytes=1700)
    )
    with pymerge.open_checkpoint(tmp_path / "out") as found:
        assert set(found) == set(tensors) and len(found.files) == 2


def test_fp8_of_one_component_is_refused_by_name(folders: list[str]) -> None:
    """How its scales are read, and what is to be taken out, stands in the component's own config.json."""
    place = Path(folders[1]) / "text_encoder/model.safetensors"
    tensors = load_file(place)
    fc = "text_model.layers.0.fc.weight"
    save_file(tensors | {fc: tensors[fc].to(torch.float8_e4m3fn), f"{fc}_scale": torch.ones(1)}, place)
    with pytest.raises(UnsupportedDtype, match="component text_encoder: fp8 weights with scales"):
        pymerge.merge(folders[0], folders[1:], out="out", **MERGE)


@pytest.mark.parametrize("keys", [{"relax": {"vocabulary": "truncate"}}, {"chat_template": "chatml"}], ids=str)
def test_a_pipeline_has_no_one_vocabulary(folders: list[str], keys: dict) -> None:
    """Rows would change, and the component's own config.json would not."""
    with pytest.raises(RecipeError, match="merge the folder of one component"):
        pymerge.merge(folders[0], folders[1:], out="out", **MERGE | keys)
