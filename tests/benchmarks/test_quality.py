"""The quality suite on two tasks of models that have hardly learnt anything: the same path as `make quality`."""

import json

import pytest
import torch

import pymerge

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from benchmarks.quality import report, run, trial, verdicts  # noqa: E402
from benchmarks.quality.recipes import BY_NAME, RECIPES  # noqa: E402
from benchmarks.quality.vision import Schedule, Vision, occluded, splits  # noqa: E402
from pymerge.demo.data import digits  # noqa: E402
from pymerge.runtime import emr, esmpp  # noqa: E402

CHOSEN = ["linear", "TA", "RegMean", "RegMean++", "EMR", "ESM", "ESM++", "PAVE + TA", "TA + SVC"]


class Tiny(Vision):
    name = "tiny"
    tasks: tuple[str, ...] = ("rotated", "parity")

    def __init__(self):
        super().__init__(Schedule(width=16, layers=2, base_epochs=3, head_epochs=1, task_epochs=3))


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def found(suite):
    run.FAMILIES["tiny"] = Tiny
    yield run.Suite(["tiny"], [0], CHOSEN, suite, 0).run()
    del run.FAMILIES["tiny"]


def test_images_are_divided_and_seen_by_one_part_only():
    first, second = splits(0), splits(1)
    assert sorted(int(n) for part in first.values() for n in part) == list(range(1797))
    assert first["test"].tolist() != second["test"].tolist()
    assert (occluded(digits().images[:2])[..., 6:, :] == -1).all()


def test_scores_are_those_of_the_merged_networks(found, suite, tmp_path):
    family, folder = Tiny(), suite / "tiny" / "seed-0"
    models = [folder / "tasks" / task for task in family.tasks]
    for name in ("TA", "ESM++"):
        recipe = BY_NAME[name]
        trial.merge(family, folder, recipe, tmp_path / name)
        for task in family.tasks:
            network = family.load(tmp_path / name)
            if name == "ESM++":
                esmpp.attach(network, tmp_path / name)
            score = family.score(network, task, folder, "test")
            assert found["families"]["tiny"]["rows"][name]["0"]["default"][task] == score
    by_hand = pymerge.merge(
        family.load(folder / "base"),
        [family.load(model) for model in models],
        method="task_arithmetic",
        exclude=family.heads,
        scale=0.3 * 2,
    )
    merged = trial.Merged(family, folder, BY_NAME["TA"], tmp_path / "TA")
    assert merged.scores(2.0, "test") == {t: family.score(by_hand, t, folder, "test") for t in family.tasks}
    assert merged.scores(0.0, "test") == found["families"]["tiny"]["seeds"]["0"]["base"]["test"]


def test_each_task_has_its_own_model_of_emr(found, suite, tmp_path):
    family, folder = Tiny(), suite / "tiny" / "seed-0"
    trial.merge(family, folder, BY_NAME["EMR"], tmp_path / "merged")
    merged = trial.Merged(family, folder, BY_NAME["EMR"], tmp_path / "merged")
    for number, task in enumerate(family.tasks):
        loaded = emr.load(tmp_path / "merged", folder / "base", number)
        weights = [weight for name, weight in loaded.items() if not name.startswith("classifier")]
        assert sorted(float(w.sum()) for w in weights) == sorted(float(w.sum()) for w in merged.ends[task])
    assert any(not torch.equal(a, b) for a, b in zip(*merged.ends.values(), strict=True))


def test_the_experts_of_esmpp_are_scaled_with_the_model(found, suite, tmp_path):
    family, folder = Tiny(), suite / "tiny" / "seed-0"
    trial.merge(family, folder, BY_NAME["ESM++"], tmp_path / "merged")
    merged = trial.Merged(family, folder, BY_NAME["ESM++"], tmp_path / "merged")
    assert merged.experts and all(whole.abs().max() > 0 for _, whole in merged.experts)
    assert merged.scores(0.0, "test") == found["families"]["tiny"]["seeds"]["0"]["base"]["test"]


def test_what_was_measured_is_not_measured_again(found, suite, monkeypatch):
    monkeypatch.setattr(trial, "merge", lambda *arguments: pytest.fail("merged again"))
    again = run.Suite(["tiny"], [0], CHOSEN, suite, 0)
    assert again.run() == found == again.found()
    assert not run.Suite(["tiny"], [1], CHOSEN, suite, 0).found()["families"]["tiny"]["seeds"]
    recipe = BY_NAME["TA"]
    changed = type(recipe)(name=recipe.name, method=recipe.method, parameters={"scale": 0.2})
    with pytest.raises(pytest.fail.Exception, match="merged again"):
        trial.measured(Tiny(), suite / "tiny" / "seed-0", changed, "other")


def test_a_failed_merge_is_a_row_that_says_so(found, suite, monkeypatch):
    monkeypatch.setitem(BY_NAME, "TA", type(BY_NAME["TA"])(name="TA", method="slerp", parameters={"t": 0.5}))
    row = run.measure("tiny", suite, 0, "TA", "digest")
    assert "slerp" in row["failed"]


def test_the_report_names_every_recipe_and_fills_the_readme(found, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(found, tmp_path, readme)
    kept, text = json.loads((tmp_path / "quality.json").read_text()), (tmp_path / "quality.md").read_text()
    assert kept["families"] == json.loads(json.dumps(found["families"]))
    assert all(f"\n| {name} |" in text for name in CHOSEN)
    lines = readme.read_text()
    assert lines.startswith("before\n") and lines.endswith("\nafter\n") and "\nold\n" not in lines
    assert "| SVC improves TA |" in lines and "not run" in lines  # TIES is not among the chosen
    pytest.importorskip("matplotlib")
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def test_the_walk_finds_the_best_scale_of_the_grid():
    for best in (trial.GRID[0], 0.5, 1.0, 4.0, trial.GRID[-1]):
        scale, tried = trial.best_scale(lambda s, best=best: -abs(s - best), True)
        assert scale == best and f"{best:.3f}" in tried
        assert trial.best_scale(lambda s, best=best: abs(s - best), False)[0] == best
    assert len(trial.best_scale(lambda s: -abs(s - 1), True)[1]) == 3


def rows(**scores):
    """A family of one task whose individual models score 0.8; scores: recipe -> one a seed."""
    seeds = {str(n): {"individual": {"test": {"task": 0.8}}} for n in range(3)}
    found = {
        name: {str(n): {how: {"task": value} for how in verdicts.SETTINGS} for n, value in enumerate(values)}
        for name, values in scores.items()
    }
    return {"seeds": seeds, "higher_is_better": True, "rows": found}


def test_verdicts_are_paired_over_seeds():
    """Seeds differ by far more than the recipes do."""
    family = rows(TA=[0.4, 0.6, 0.8], TIES=[0.41, 0.612, 0.808])
    ahead = verdicts.step([family], "TIES", "TA", "default") or {}
    assert ahead["points"] == pytest.approx(100 * 0.01 / 0.8) and ahead["verdict"] == verdicts.HOLDS
    assert ahead["error"] == pytest.approx(100 / 0.8 * 0.002 / 3**0.5)
    behind = verdicts.step([family], "TA", "TIES", "default") or {}
    assert behind["verdict"] == verdicts.FAILS
    noisy = verdicts.step([rows(TA=[0.4, 0.6, 0.8], TIES=[0.3, 0.8, 0.8])], "TIES", "TA", "default") or {}
    assert noisy["verdict"] == verdicts.NOISE
    assert verdicts.step([family], "ESM", "TA", "default") is None


def test_a_chain_fails_with_one_of_its_steps_and_ace_meets_the_best():
    claim = next(c for c in verdicts.CLAIMS if c.text == "ESM > TSV-M > TIES > TA")
    family = rows(ESM=[0.8, 0.79, 0.8], **{"TSV-M": [0.7, 0.7, 0.71]}, TIES=[0.5, 0.51, 0.5], TA=[0.6, 0.6, 0.61])
    found = verdicts.verdict(claim, [family], "default") or {}
    assert found["verdict"] == verdicts.FAILS and found["points"] == pytest.approx(100 * (2.39 - 1.81) / 3 / 0.8)
    assert verdicts.opponent([family], "default") == "TSV-M"  # ESM reads data


def test_recipes_are_distinct_and_say_what_they_need():
    assert len(BY_NAME) == len(RECIPES) and len({trial.slug(recipe) for recipe in RECIPES}) == len(RECIPES)
    known = pymerge.methods.list("combine")
    assert all(recipe.method in known for recipe in RECIPES)
    needs = {recipe.name: recipe.observed for recipe in RECIPES if recipe.observed}
    assert needs == {
        "RegMean": "statistics",
        "RegMean++": "data",
        "ESM": "statistics",
        "ESM++": "statistics",
        "PAVE + TA": "statistics",
        "PAVE + TIES": "statistics",
        "PAVE + EMR": "statistics",
    }
    assert not BY_NAME["EMR"].data_free and BY_NAME["ACE"].data_free
    named = {name for claim in verdicts.CLAIMS for name in claim.chain} - {verdicts.BEST}
    assert named <= set(BY_NAME)
