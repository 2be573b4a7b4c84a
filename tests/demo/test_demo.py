"""The demo on a schedule of seconds: the same path as `pymerge demo`, with models that have hardly learnt anything."""

import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import pymerge

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from pymerge.demo import merges, show, train  # noqa: E402
from pymerge.demo.data import BASE, TASKS, digits, labels, tilted  # noqa: E402

SHORT = train.Schedule(base_epochs=2, head_epochs=1, task_epochs=1)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with train.quiet_and_alone():
        assert train.train_all(folder, lambda line: None, SHORT)
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_data_is_split_and_labelled():
    data = digits()
    assert data.images.shape == (1797, 1, 8, 8) and data.images.min() == -1 and data.images.max() == 1
    assert sorted([*data.train.tolist(), *data.test.tolist()]) == list(range(1797)) and len(data.test) == 500
    parity, large = TASKS[2], TASKS[3]
    assert torch.equal(labels(BASE), data.digits)
    assert torch.equal(labels(parity), data.digits % 2) and torch.equal(labels(large), (data.digits >= 5).long())


def test_four_quarter_turns_of_a_blob_come_back():
    """A blob around the centre does not leave the image, so eight turns of 45 degrees give it back, blurred."""
    blob = torch.full((1, 1, 8, 8), -1.0)
    blob[..., 3:5, 3:5] = 1.0
    turned = blob
    for _ in range(8):
        turned = tilted(turned)
    assert torch.allclose(turned, turned.rot90(1, (-2, -1)), atol=1e-5)
    assert turned[..., 3:5, 3:5].min() > turned[..., 0, :].max()


def test_training_is_deterministic_and_not_repeated(out, tmp_path):
    with train.quiet_and_alone():
        assert not train.train_all(out, lambda line: None, SHORT)
        assert train.train_all(tmp_path, lambda line: None, SHORT)
    for name in ("base", *(f"tasks/{task.name}" for task in TASKS)):
        first, second = weights(out / name), weights(tmp_path / name)
        assert all(torch.equal(first[key], second[key]) for key in first | second)


def test_head_is_kept_while_the_encoder_learns(out):
    base, mirrored = weights(out / "base"), weights(out / "tasks" / "mirrored")
    assert torch.equal(base["classifier.weight"], mirrored["classifier.weight"])
    assert not torch.equal(base["vit.layernorm.weight"], mirrored["vit.layernorm.weight"])


def test_every_method_has_a_row_and_values_are_the_merge(out, monkeypatch):
    monkeypatch.setattr(train, "SCALES", (0.5, 1.0))
    with train.quiet_and_alone():
        rows = show.evaluate_merges(out, train.observe_all(out), Console(quiet=True))
    purified = ["dare + task_arithmetic", "pave + task_arithmetic", "pave + ties", "trim + task_arithmetic"]
    calibrated = [f"task_arithmetic + {name}" for name in pymerge.methods.list("calibrate")]
    assert [row["name"] for row in rows[2:]] == [*pymerge.methods.list("combine"), *purified, *calibrated]
    skipped = {row["name"]: row["skipped"] for row in rows if row["skipped"]}
    adapters = dict.fromkeys(("core_space", "knots"), "needs adapters")
    assert skipped == {"fisher": "needs fisher", "passthrough": "takes one model"} | adapters
    for row in rows:
        if not row["skipped"]:
            assert set(row["accuracy"]) == {task.name for task in TASKS}
            assert row["mean"] == pytest.approx(sum(row["accuracy"].values()) / 4)
    assert all(row["seconds"] > 0 and row["memory"] > 1e6 for row in rows[2:] if not row["skipped"])
    json.dumps(rows)
    assert show.table(rows).row_count == len(rows) - len(skipped)

    base, merged = weights(out / "base"), weights(out / "merged" / "task_arithmetic")
    children = [weights(out / "tasks" / task.name) for task in TASKS]
    scale = pymerge.methods.get("task_arithmetic")().scale
    for name, value in base.items():
        if name.startswith("classifier."):
            assert torch.equal(merged[name], value)
            continue
        delta = torch.stack([child[name].double() - value for child in children]).sum(0)
        torch.testing.assert_close(merged[name].double(), value + scale * delta, rtol=0, atol=1e-6)


def test_pairwise_methods_merge_halves(out):
    """slerp of slerps, t = 0.5 each: the two halves stay beside the result."""
    job = merges.job("slerp", 4)
    assert job.pairwise and not job.skipped
    merges.run(job, out / "base", [out / "tasks" / task.name for task in TASKS], [], out / "merged" / "slerp")
    halves = [weights(out / "merged" / f"slerp-4-{n}")["vit.layernorm.weight"].double() for n in (0, 1)]
    merged = weights(out / "merged" / "slerp")["vit.layernorm.weight"].double()
    cosine = torch.dot(halves[0], halves[1]) / (halves[0].norm() * halves[1].norm())
    expected = (halves[0] + halves[1]) / (2 * torch.cos(torch.arccos(cosine.clamp(max=1)) / 2))
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)


def test_methods_that_cannot_run_say_why(monkeypatch):
    info = pymerge.methods.describe("ties")
    monkeypatch.setattr(pymerge.methods, "describe", lambda name: info)
    assert not merges.job("ties", 4).skipped
    object.__setattr__(info, "needs", ("covariance",))
    assert merges.job("ties", 4).observed and not merges.job("ties", 4).skipped
    object.__setattr__(info, "needs", ("covariance", "fisher"))
    assert merges.job("ties", 4).skipped == "needs fisher"
    object.__setattr__(info, "needs", ())
    object.__setattr__(info, "models", (2, 3))
    assert merges.job("ties", 4).skipped == "takes 2 to 3 models"


def test_a_failed_merge_carries_the_message(out, tmp_path):
    job = merges.Job(name="ties", method="ties", keywords={"density": 2.0})
    with pytest.raises(pymerge.MergeError, match=r"demo, ties: RecipeError: (.|\n)*density"):
        merges.run(job, out / "base", [out / "tasks" / "parity"], [], tmp_path / "merged")


def test_statistics_are_of_each_tasks_model_and_observed_once(out):
    """The first layer's input of the tilted task, by a hook of the test."""
    with train.quiet_and_alone():
        files = train.observe_all(out)
        written = [file.stat().st_mtime_ns for file in files]
        assert [file.stat().st_mtime_ns for file in train.observe_all(out)] == written
        model, seen = train.load(out / "tasks" / "tilted"), []
        query = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
        query.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            model(tilted(digits().images[digits().train[:32]]))
    name = "vit.encoder.layer.0.attention.attention.query"
    found = pymerge.statistics.open_statistics(files[1])[name].second_moment()
    rows = seen[0].reshape(-1, 64).double()
    assert len(rows) == 32 * 5
    torch.testing.assert_close(found, rows.mT @ rows, rtol=1e-5, atol=1e-4)


def test_scale_is_the_best_on_training_images(out):
    base, merged = train.load(out / "base"), train.load(out / "tasks" / "mirrored")
    heads = train.load_heads(out / "tasks")
    with train.quiet_and_alone():
        scale, found = train.rescaled(base, merged, heads)
        means = {}
        for s in train.SCALES:
            model = train.load(out / "base")
            state = {k: v + s * (merged.vit.state_dict()[k] - v) for k, v in base.vit.state_dict().items()}
            model.vit.load_state_dict(state)
            means[s] = sum(train.accuracies_on(digits().train[-500:], model, heads).values())
            if s == scale:
                assert found == train.accuracies_on(digits().test, model, heads)
    assert means[scale] == max(means.values())


def test_merges_after_the_deadline_are_left_out(out):
    with train.quiet_and_alone():
        rows = show.evaluate_merges(out, [], Console(quiet=True), deadline=0.0)
    reasons = {"left to --all", "needs fisher", "needs adapters", "takes one model"}
    assert {row["skipped"] for row in rows[2:]} == reasons


def test_picture_has_every_merge(tmp_path):
    pytest.importorskip("matplotlib")
    from pymerge.demo import picture

    entries = [("(individual models)", 0.9), ("(base)", 0.3), ("a", 0.5), ("b", 0.6)]
    rows = [{"name": name, "skipped": "", "mean": mean, "rescaled_mean": mean} for name, mean in entries]
    out = picture.draw([*rows, {"name": "c", "skipped": "needs fisher"}], tmp_path / "accuracy.png")
    assert out.read_bytes().startswith(b"\x89PNG")
