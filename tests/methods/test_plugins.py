"""Methods that installed packages declare: found, lazily imported, refused in words where something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pymerge
from pymerge import methods
from pymerge.errors import OutputError, RecipeError
from pymerge.methods.registry import REGISTRY
from pymerge.recipe import Recipe
from tests.methods.plugin_packages import HALF, install
from tests.models import family, interrupted_after, read_model

BROKEN = "raise OSError('no such device\\nsecond line')\n"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder of installed packages; what was found in it is forgotten afterwards."""
    folder, modules = tmp_path / "installed", set(sys.modules)
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def forget() -> None:
        REGISTRY.__dict__.pop("_declared", None)
        REGISTRY._broken.clear()
        for name in [name for name, cls in REGISTRY._classes.items() if cls.package]:
            del REGISTRY[name]
        for name in set(sys.modules) - modules:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]

    forget()
    yield folder
    forget()


def test_a_method_of_a_package_is_used_like_any_other(installed, tmp_path):
    install(installed, "half-merge", {"half": "half_merge:Half"}, version="2.1")
    assert methods.describe("half").package == "half-merge 2.1" and methods.get("half").name == "half"
    assert "half" in methods.list("combine") and methods.describe("ties").package == ""
    base, tuned = family(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    entries = "".join(
        f"  - {{model: {path}, parameters: {{weight: {w}}}}}\n" for path, w in zip(tuned, (1, 2, 3), strict=True)
    )
    recipe.write_text(f"merge_method: half\nbase_model: {base}\nparameters: {{lambda: 0.25}}\nmodels:\n{entries}")
    summary = pymerge.Recipe.from_yaml(recipe).run(tmp_path / "out")
    assert summary["methods_from"] == {"half": "half-merge 2.1"}
    expected = pymerge.merge(
        str(base),
        list(map(str, tuned)),
        method="task_arithmetic",
        weight=[1, 2, 3],
        scale=0.25,
        out=tmp_path / "expected",
    )
    assert "methods_from" not in expected
    for name, tensor in read_model(tmp_path / "expected").items():
        assert torch.equal(read_model(tmp_path / "out")[name], tensor), name


def test_steps_around_and_searches_know_it(installed):
    install(installed, "half-merge", {"half": "half_merge:Half"})
    base = {"w": torch.zeros(4, 4)}
    tuned = {"w": torch.arange(16.0).reshape(4, 4)}
    merged = pymerge.merge(base, [tuned], method="half", purify={"method": "trim", "density": 0.25})
    assert torch.equal(merged["w"], torch.where(tuned["w"] >= 12, tuned["w"] / 2, 0))
    from pymerge.tuning.over import axes_of

    recipe = Recipe.from_kwargs(base, [tuned], "half")
    assert [axis.name for axis in axes_of(recipe, {"scale": "0..1"})] == ["scale"]


def test_it_is_imported_when_it_is_asked_for(installed):
    install(installed, "half-merge", {"half": "half_merge:Half"})
    assert "half" in REGISTRY and "half" in list(REGISTRY) and methods.get("ties").name == "ties"
    assert "half_merge" not in sys.modules
    methods.get("half")
    assert "half_merge" in sys.modules


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        (BROKEN, "bad:Half", "OSError: no such device$"),
        ("import sys\nsys.exit(3)\n", "bad:Half", "SystemExit: 3"),
        (HALF, "bad:Hlaf", "AttributeError: .*Hlaf"),
        (HALF, "absent:Half", "ModuleNotFoundError: .*absent"),
        ("def Half(): ...\n", "bad:Half", "no subclass of pymerge.methods.Combine, Purify or Calibrate"),
        (HALF.replace("@dataclass(frozen=True, kw_only=True)", ""), "bad:Half", "not decorated with @dataclass"),
        (HALF.replace("frozen=True, ", ""), "bad:Half", "not decorated with @dataclass"),
    ],
    ids=["import", "exit", "class", "module", "kind", "undecorated", "not-frozen"],
)
def test_a_broken_package_breaks_nothing_but_itself(installed, caplog, source, target, reason):
    install(installed, "bad", {"half": target}, source)
    install(installed, "good", {"also_half": "good:Half"})
    with pytest.raises(RecipeError, match=f"method 'half' of bad 1.0: {target} cannot be used: .*{reason}"):
        methods.get("half")
    with pytest.raises(RecipeError, match="purify.*: method 'half' of bad 1.0"):
        Recipe.from_kwargs({}, [{}], "task_arithmetic", purify="half")
    assert "half" not in methods.list() and {"also_half", "ties"} < set(methods.list())
    assert caplog.records == []  # whoever asked for it was told


def test_listing_says_once_what_it_leaves_out(installed, caplog):
    install(installed, "bad", {"half": "bad:Half"}, BROKEN)
    assert "half" not in methods.list() and "half" not in methods.list()
    (record,) = caplog.records
    assert record.getMessage() == (
        "left out: method 'half' of bad 1.0: bad:Half cannot be used: OSError: no such device"
    )


def test_the_names_of_pymerge_stay_its_own(installed, caplog):
    install(installed, "half-merge", {"ties": "half_merge:Half", "half": "half_merge:Half"})
    assert methods.get("ties").__module__ == "pymerge.methods.ties" and methods.get("half").name == "half"
    assert caplog.messages == ["left out: method 'ties' of half-merge 1.0: pymerge has one of that name"]


def test_two_packages_with_one_name_are_refused(installed):
    install(installed, "first", {"half": "first:Half"})
    install(installed, "second", {"half": "second:Half"}, version="3")
    with pytest.raises(RecipeError, match="'half': is declared by first 1.0 and second 3: uninstall all but one"):
        methods.get("half")
    assert not {"first", "second"} & set(sys.modules)


def test_two_names_of_one_class_are_refused(installed):
    install(installed, "half-merge", {"half": "half_merge:Half", "moiety": "half_merge:Half"})
    assert methods.get("half").name == "half"
    with pytest.raises(RecipeError, match="its class is known as 'half' already"):
        methods.get("moiety")


def test_a_class_that_registers_itself_too(installed):
    source = HALF.replace("@dataclass", "@register('half')\n@dataclass").replace("param,", "param, register,")
    install(installed, "half-merge", {"half": "half_merge:Half"}, source)
    assert methods.get("half").package == "half-merge 1.0"


def test_a_misspelt_name_finds_it(installed):
    install(installed, "half-merge", {"halfway": "half_merge:Half"})
    with pytest.raises(RecipeError, match="did you mean halfway"):
        methods.get("halfwy")


def test_another_version_does_not_continue_a_merge(installed, tmp_path):
    install(installed, "half-merge", {"half": "half_merge:Half"})
    base, tuned = family(tmp_path)
    arguments = {"method": "half", "out": tmp_path / "out"}
    with interrupted_after(1):
        pymerge.merge(str(base), list(map(str, tuned)), **arguments)
    methods.get("half").package = "half-merge 1.1"
    with pytest.raises(OutputError, match='methods_from.half: was "half-merge 1.0", is now "half-merge 1.1"'):
        pymerge.merge(str(base), list(map(str, tuned)), **arguments)


def test_the_command_line_lists_it_without_torch(installed):
    install(installed, "half-merge", {"half": "half_merge:Half"})
    install(installed, "bad", {"worse": "bad:Half"}, BROKEN)
    code = "import sys; from pymerge.cli import app; app(['methods', '--json'], standalone_mode=False)"
    code += "; assert 'torch' not in sys.modules"
    path = os.pathsep.join([str(installed), str(Path(pymerge.__file__).parents[1])])
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert run.returncode == 0, run.stderr
    found = {row["name"]: row["package"] for row in json.loads(run.stdout)}
    assert found["half"] == "half-merge 1.0" and "worse" not in found and found["ties"] == ""
    assert len(run.stderr.splitlines()) == 1 and "method 'worse' of bad 1.0" in run.stderr
