"""pymerge's methods inside mergekit: the same tensors as a merge by pymerge itself, through mergekit's own command.

`make test-mergekit` runs them in an environment with mergekit."""

import sys

import pytest
import torch

pytest.importorskip("mergekit", reason="mergekit is not installed: make test-mergekit")

import yaml
from click.testing import CliRunner
from mergekit.merge_methods import generalized_task_arithmetic, merge_state_dicts, merge_tensors, registry
from mergekit.scripts.run_yaml import main as mergekit_yaml
from mergekit.sparsify import RescaleNorm, SparsificationMethod, sparsify
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import pymerge
from pymerge.errors import InputError, RecipeError
from pymerge.integrations import mergekit as inside
from pymerge.integrations import mergekit_stock as stock
from pymerge.integrations.mergekit_command import check_config
from pymerge.integrations.mergekit_command import main as pymerge_mergekit_yaml

NAMES = inside.register()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two fine-tuned models, with statistics and Fisher information beside them."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    config = LlamaConfig(vocab_size=64, num_attention_heads=4, num_key_value_heads=2, **shape)
    model = LlamaForCausalLM(config)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(root / "base")
    for seed, name in enumerate("ab", 1):
        g = torch.Generator().manual_seed(seed)
        model.load_state_dict({n: v + 0.02 * torch.randn(v.shape, generator=g) for n, v in start.items()})
        model.save_pretrained(root / name)
        tokens = torch.randint(0, 64, (4, 16), generator=g)
        found = pymerge.observe(root / name, [{"input_ids": tokens}], exclude=["*.layers.1.mlp.*", "lm_head"])
        found.save(root / f"{name}.stats.safetensors")
        fisher = {n: torch.rand(v.shape, generator=g) for n, v in start.items()}
        save_file(fisher, root / f"{name}.fisher.safetensors")
    return root


def run(root, out, method, parameters, own=None, **keys):
    """mergekit's own command; `own`: parameters of each model. Returns the merged tensors."""
    listed = [{"model": str(root / n)} | ({"parameters": own[i]} if own else {}) for i, n in enumerate("ab")]
    config = {"merge_method": f"pymerge_{method}", "base_model": str(root / "base"), "models": listed}
    (out / "config.yaml").write_text(yaml.safe_dump(config | {"parameters": parameters, "dtype": "float32"} | keys))
    result = CliRunner().invoke(mergekit_yaml, [str(out / "config.yaml"), str(out / "merged")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return load_file(out / "merged" / "model.safetensors")


def expected(models, out, method, base=True, **parameters):
    names = [models / name for name in "ab"]
    pymerge.merge(models / "base" if base else None, names, method=method, out=out / "expected", **parameters)
    return load_file(out / "expected" / "model.safetensors")


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert got[name].dtype == wanted[name].dtype, name
        assert torch.equal(got[name], wanted[name]), name


def beside(models, kind):
    return [str(models / f"{name}.{kind}.safetensors") for name in "ab"]


# method, parameters in mergekit's YAML, and in pymerge's where they differ
CASES = [
    ("ace", {}, None),
    ("ties", {"scope": "tensor", "density": 0.3, "scale": 0.7}, None),
    ("tsv_m", {"calibrate": "svc"}, None),
    ("iso_c", {"purify": "trim", "trim.density": 0.4}, {"purify": {"method": "trim", "density": 0.4}}),
    (
        "task_arithmetic",
        {"lambda": 0.5, "calibrate": "svc", "svc.alpha": 0.5},
        {"scale": 0.5, "calibrate": {"method": "svc", "alpha": 0.5}},
    ),
    (
        "tsv_m",
        {"spectral": [{"filter": "embed", "value": True}, {"filter": "mlp", "value": False}], "rest": "sum"},
        {"spectral": {"include": ["*embed*"], "exclude": ["*mlp*"], "rest": "sum"}},
    ),
    ("tsv_m", {"split": [{"filter": "gate_proj", "value": 2}]}, {"split": {"*gate_proj*": 2}}),
    ("della", {"density": 0.5, "epsilon": 0.2, "style": "mergekit", "weight": 0.4, "seed": 7}, None),
]


@pytest.mark.parametrize(("method", "theirs", "ours"), CASES)
def test_equals_a_merge_by_pymerge(models, tmp_path, method, theirs, ours):
    wanted = expected(models, tmp_path, method, **(theirs if ours is None else ours))
    assert_same(run(models, tmp_path, method, theirs), wanted)


def test_values_of_single_models(models, tmp_path):
    own = [{"weight": 0.3, "density": 0.2}, {"weight": 0.9}]
    got = run(models, tmp_path, "breadcrumbs", {"density": 0.5, "scale": 1}, own)
    assert_same(got, expected(models, tmp_path, "breadcrumbs", weight=[0.3, 0.9], density=[0.2, 0.5], scale=1))


def test_gradient_over_the_layers_is_lines(models, tmp_path):
    """What is said of `lines`, which has no place here."""
    got = run(models, tmp_path, "task_arithmetic", {"scale": [0.2, 1.0]})
    wanted = expected(models, tmp_path, "task_arithmetic", scale=1, calibrate={"method": "lines", "a": 0.2, "b": 0.8})
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=1e-7)


def test_base_is_a_model_like_any_other(models, tmp_path):
    """mergekit adds the base to the models of a method that averages."""
    values = {"base": 0.5, "a": 0.2, "b": 0.3}
    listed = [{"model": str(models / name), "parameters": {"weight": w}} for name, w in values.items()]
    got = run(models, tmp_path, "linear", {}, models=listed)
    names = [models / name for name in values]
    pymerge.merge(None, names, method="linear", weight=list(values.values()), out=tmp_path / "expected")
    assert_same(got, load_file(tmp_path / "expected" / "model.safetensors"))
    with pytest.raises(RecipeError, match="pymerge_linear averages the base .* list it with its weight"):
        run(models, tmp_path, "linear", {}, [{"weight": 0.5}, {"weight": 0.5}])


@pytest.mark.parametrize(
    ("method", "theirs", "ours"),
    [
        ("regmean", {"alpha": 0.9}, {"alpha": 0.9}),
        ("esm", {"layer_power": 0, "preset": "vit"}, {"layer_power": 0, "preset": "vit"}),
        (
            "ties",
            {"scope": "tensor", "purify": "pave", "pave.allocation": "none", "pave.rank_ratio": 0.8},
            {"scope": "tensor", "purify": {"method": "pave", "allocation": "none", "rank_ratio": 0.8}},
        ),
    ],
)
def test_statistics(models, tmp_path, method, theirs, ours):
    """Some matrices have none: they are merged as in a merge of the whole model."""
    paths = beside(models, "stats")
    got = run(models, tmp_path, method, theirs, [{"stats": path} for path in paths])
    assert_same(got, expected(models, tmp_path, method, statistics=paths, **ours))


def test_fisher(models, tmp_path):
    paths = beside(models, "fisher")
    own = [{"fisher": path} for path in paths]
    got = run(models, tmp_path, "fisher", {"normalize": False}, own, base_model=None)
    assert_same(got, expected(models, tmp_path, "fisher", base=False, fisher=paths, normalize=False))


def test_bfloat16(models, tmp_path):
    """mergekit rounds the inputs to `dtype`, pymerge the result once: as pymerge does with models in that dtype."""
    got = run(models, tmp_path, "tsv_m", {}, dtype="bfloat16")
    states = [load_file(models / name / "model.safetensors") for name in ("base", "a", "b")]
    base, *tuned = [{name: t.bfloat16() for name, t in state.items()} for state in states]
    assert_same(got, pymerge.merge(base, tuned, method="tsv_m"))


@pytest.fixture
def three():
    torch.manual_seed(0)
    base = {"a.weight": torch.randn(20, 12), "norm": torch.randn(12)}
    return {"base": base} | {n: {k: v + 0.1 * torch.randn_like(v) for k, v in base.items()} for n in "ab"}


@pytest.mark.parametrize("method", [n for n in NAMES if n not in ("pymerge_regmean", "pymerge_esm", "pymerge_fisher")])
def test_every_method_merges_state_dicts(three, method):
    """With what the message asks for where a default looks at the whole model."""
    name = method.removeprefix("pymerge_")
    info = pymerge.methods.describe(name)
    base = "base" if info.base in ("required", "first") else None
    models = {label: three[label] for label in [*([base] if base else []), *"ab"[: info.models[1]]]}
    parameters = {p.name: 0.3 for p in info.parameters if p.default is None}
    arguments = {"base": base, "parameters": parameters}
    try:
        got = merge_state_dicts(models, method, **arguments)
    except RecipeError as error:
        assert "say `scope: tensor`" in str(error)
        parameters["scope"] = "tensor"
        got = merge_state_dicts(models, method, **arguments)
    tuned = [model for label, model in models.items() if label != base]
    assert_same(got, pymerge.merge(models.get("base"), tuned, method=name, **parameters))


def test_every_method_is_registered_or_has_a_reason():
    reasons = inside.not_registered()
    combine = set(pymerge.methods.list("combine"))
    assert {f"pymerge_{name}" for name in combine - set(reasons)} == set(NAMES)
    assert set(reasons) == {"core_space", "emr", "esmpp", "knots", "lines", "regmean_plusplus"}
    assert all("\n" not in reason for reason in reasons.values())


def test_registering_again_changes_nothing_and_takes_no_name():
    before = registry.registered_methods()
    assert inside.register() == NAMES
    assert registry.registered_methods() == before
    with pytest.MonkeyPatch.context() as patch:
        taken = {name: method for name, method in registry._METHODS.items() if name != "pymerge_ace"}
        patch.setattr(registry, "_METHODS", taken | {"pymerge_ace": registry.get("linear")})
        with pytest.raises(ValueError, match="'pymerge_ace' is already registered"):
            inside.register()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"density": 2.0}, r"pymerge_ties: density: must be in \[0, 1\], got 2.0"),
        ({"density": "much"}, r"pymerge_ties: density: must be in \[0, 1\], got 'much'"),
        ({"merge_func": "median"}, "pymerge_ties: merge_func: must be one of"),
        ({}, "ties looks at the whole model first.* say `scope: tensor`"),
        ({"scope": "tensor", "calibrate": "lines"}, r"calibrate: lines needs a layer's place .*`scale: \[a, a \+ b\]`"),
        ({"scope": "tensor", "calibrate": "svd"}, "calibrate: unknown method 'svd': did you mean svc"),
        ({"scope": "tensor", "purify": "ties"}, "purify: unknown method 'ties'"),
        ({"scope": "tensor", "svc.alpha": 1}, "svc.alpha: say calibrate: svc too"),
        ({"scope": "tensor", "lambda": 1, "scale": 1}, "lambda and scale are two names of one value"),
        ({"scope": "tensor", "purify": "pave"}, "pave needs `stats: FILE` among the parameters of a"),
    ],
)
def test_wrong_parameters(three, parameters, message):
    with pytest.raises(RecipeError, match=message):
        merge_state_dicts(three, "pymerge_ties", base="base", parameters=parameters)


def test_ranges_are_checked_before_anything_is_merged(models, tmp_path):
    with pytest.raises(RecipeError, match="pymerge_ace: tau: must be"):
        run(models, tmp_path, "ace", {"tau": [{"filter": "lm_head", "value": -1}, {"value": 0.3}]})
    assert not list(tmp_path.glob("merged/*.safetensors"))


def test_statistics_of_another_model(models, tmp_path):
    paths = beside(models, "stats")[::-1]
    tokens = {"input_ids": torch.arange(16)[None]}
    with pytest.raises(InputError, match="no such file"):
        run(models, tmp_path, "regmean", {}, [{"stats": "nowhere.safetensors"}, {"stats": paths[0]}])
    other = LlamaForCausalLM.from_pretrained(models / "a")
    other.save_pretrained(tmp_path / "other", max_shard_size="20KB")
    stats = str(tmp_path / "other.stats.safetensors")
    pymerge.observe(tmp_path / "other", [tokens]).save(stats)
    with pytest.raises(InputError, match="whose weight files are not those of"):
        run(models, tmp_path, "regmean", {}, [{"stats": stats}, {"stats": paths[0]}])


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_files_of_renamed_layers(models, tmp_path, method):
    """A slice that puts layers 1 and 2 in the places of 0 and 1 must not use what lies beside the models for those."""
    key = "fisher" if method == "fisher" else "stats"
    base = {} if method == "fisher" else {"base_model": str(models / "base")}
    sources = [
        {"model": str(models / name), "layer_range": [1, 3], "parameters": {key: path}}
        for name, path in zip("ab", beside(models, key), strict=True)
    ]
    if base:
        sources.append({"model": base["base_model"], "layer_range": [1, 3]})
    config = {"merge_method": f"pymerge_{method}", "slices": [{"sources": sources}]} | base
    if method == "fisher":
        config["parameters"] = {"normalize": False}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = [str(tmp_path / "config.yaml"), str(tmp_path / "merged")]
    with pytest.raises(InputError, match=r"layers\.0\..*not the tensor of this name .* without `slices`"):
        CliRunner().invoke(mergekit_yaml, arguments, catch_exceptions=False)


def test_command(models, tmp_path, monkeypatch, capsys):
    """mergekit's command with another word in front of it."""
    config = {"merge_method": "pymerge_ace", "base_model": str(models / "base"), "dtype": "float32"}
    config |= {"models": [{"model": str(models / name)} for name in "ab"]}
    path = tmp_path / "config.yaml"

    def command(*flags, **keys):
        path.write_text(yaml.safe_dump(config | keys))
        monkeypatch.setattr("sys.argv", ["pymerge-mergekit-yaml", str(path), str(tmp_path / "merged"), *flags])
        with pytest.raises(SystemExit) as end:
            pymerge_mergekit_yaml()
        return end.value.code or 0

    assert command("--no-write-model-card") == 0
    assert not (tmp_path / "merged" / "README.md").exists()
    assert generalized_task_arithmetic.sparsify is sparsify
    assert_same(load_file(tmp_path / "merged" / "model.safetensors"), expected(models, tmp_path, "ace"))
    assert command(parameters={"tua": 0.3}) == RecipeError.exit_code
    assert "unknown parameter 'tua': did you mean tau" in capsys.readouterr().err.splitlines()[-1]
    try:
        assert command("--accelerate-stock", merge_method="ties", parameters={"weight": 0.5, "density": 0.3}) == 0
        assert generalized_task_arithmetic.sparsify is stock.select
    finally:
        stock.restore()


def test_command_without_mergekit(monkeypatch):
    monkeypatch.setitem(sys.modules, "mergekit.merge_methods", None)
    monkeypatch.delitem(sys.modules, "pymerge.integrations.mergekit")
    with pytest.raises(SystemExit, match=r'mergekit 0.1.5 is needed .*: pip install "pymerge\[mergekit\]"$'):
        pymerge_mergekit_yaml()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"merge_method": "pymerge_emr"},
            "mergekit gives one tensor at a time, emr leaves masks in a file",
        ),
        ({"merge_method": "pymerge_tis"}, "unknown method 'pymerge_tis': did you mean pymerge_ties"),
        ({"parameters": {"purify": ["trim", "dare"]}}, "purify: a list chooses by depth.*: trim, dare"),
        ({"models": [{"model": "a", "parameters": {"wieght": 1}}]}, "unknown parameter 'wieght': did you mean weight"),
        ({"models": [{"model": "a", "parameters": {"scale": 1}}]}, "scale: has one value for all models: move it"),
    ],
)
def test_what_mergekit_passes_over(change, message):
    good = {"merge_method": "pymerge_ties", "parameters": {"purify": "trim, dare", "int8_mask": True}}
    good |= {"models": [{"model": "a", "parameters": {"weight": 0.5, "trim.density": 0.5}}]}
    check_config(good, "config.yaml")
    check_config({"merge_method": "ties", "parameters": {"anything": 1}}, "config.yaml")
    with pytest.raises(RecipeError, match=message):
        check_config(good | change, "config.yaml")


SELECTIONS = [
    (SparsificationMethod.magnitude, {}),
    (SparsificationMethod.magnitude_outliers, {"gamma": 0.1}),
    (SparsificationMethod.magnitude_outliers, {"gamma": 0.9}),
    (SparsificationMethod.della_magprune, {"epsilon": 0.15}),
    (SparsificationMethod.random, {}),
]


@pytest.mark.parametrize("shape", [(30, 257), (409,), (7, 5, 3, 3), (1, 9), ()])
@pytest.mark.parametrize(("method", "options"), SELECTIONS)
def test_selection_is_mergekits(method, options, shape):
    """The same bits, with the same random draws, where no magnitudes are equal."""
    g = torch.Generator().manual_seed(3)
    delta = torch.randn(shape, generator=g)
    if shape == () and method == SparsificationMethod.della_magprune:
        return  # 0 / 0 in mergekit
    for density in (0.0, 0.01, 0.3, 1.0):
        if method == SparsificationMethod.della_magprune and density == 0.01:
            continue  # refused by mergekit: no room for epsilon
        for norm in (None, RescaleNorm.l1):
            torch.manual_seed(5)
            wanted = sparsify(delta, density, method, rescale_norm=norm, **options)
            torch.manual_seed(5)
            assert torch.equal(stock.select(delta, density, method, rescale_norm=norm, **options), wanted)


@pytest.mark.parametrize(("method", "options"), SELECTIONS[:2])
def test_of_equal_magnitudes_as_many_are_kept(method, options):
    """What differs are entries of one magnitude, that at a border; pymerge keeps the first of them."""
    g = torch.Generator().manual_seed(3)
    delta = torch.randn(4000, generator=g).bfloat16()
    wanted = sparsify(delta, 0.3, method, **options)
    got = stock.select(delta, 0.3, method, **options)
    assert got.dtype == wanted.dtype
    assert torch.equal(got.abs().sort().values, wanted.abs().sort().values)
    differ = delta[got != wanted].abs().unique()
    assert len(differ) in (1, 2)
    for value in differ:
        kept = (got[delta.abs() == value] != 0).int()
        assert kept.diff().abs().sum() == 1  # kept and dropped ones are not mixed


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties", "dare_ties", "della", "della_linear"])
def test_accelerated_methods(method):
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(40, 50, generator=g) for _ in range(3)]
    parameters = {"weight": [0.5, 0.7], "density": 0.4}

    def merged():
        torch.manual_seed(1)
        return merge_tensors(tensors, method, parameters=parameters, base_index=0)

    wanted = merged()
    assert generalized_task_arithmetic.sparsify is sparsify
    inside.register(accelerate_stock=True)
    try:
        assert generalized_task_arithmetic.sparsify is stock.select
        assert torch.equal(merged(), wanted)
    finally:
        stock.restore()
    assert generalized_task_arithmetic.sparsify is sparsify
