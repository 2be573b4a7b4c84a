"""The cost model: small cases by hand, what must not get slower or faster, and plans of models without weights."""

import json
from dataclasses import replace

import pytest

from pymerge.engine.cluster import parse_cluster
from pymerge.engine.costs import Cost, Phase, cached_share, merge_cost, phases
from pymerge.engine.plan import Options
from pymerge.engine.rates import KERNELS, Rates
from pymerge.engine.shape_plan import config_of, plan_shape, reshaped
from pymerge.engine.simulate import Job, Simulation, job_of, local, processor_seconds, simulated
from pymerge.errors import InputError, RecipeError
from pymerge.methods.work import NOTHING, Work
from pymerge.recipe import Recipe

ROUND = Rates(
    single=1e9,
    double=5e8,
    eigen=1e8,
    touch=1e9,
    kernels=dict.fromkeys(KERNELS, 0.0) | {"task": 1e-9},
    cached=1e12,
    disk=1e9,
    write=5e8,
    moved=1e12,
    memory=1e12,
    start=1.0,
    torch=2.0,
)
AMPLE = Options(memory=1 << 44, threads=2)


class Named:
    """Stands for an item: of those only the name is asked for."""

    def __init__(self, name: str) -> None:
        self.entry = self
        self.name = name


def job(*costs: Cost, **options) -> Job:
    items = tuple(Named(f"t{i}") for i in range(len(costs)))
    return Job(phases=[Phase("merge", items, costs)], **({"item_threads": 1, "torch": False} | options))


def cost(read: int = 0, written: int = 0, tasks: float = 0.0, work: Work = NOTHING, divisible: bool = True) -> Cost:
    return Cost(read, written, {"task": tasks}, work, divisible)


def at(job: Job, text: str, nodes: int = 1):
    return Simulation(job, parse_cluster(text, ROUND, 2)).at(nodes)


def test_an_item_by_hand():
    one = cost(tasks=3e9, work=Work(single=1e9, double=1e9, eigen=1e8, touched=1e9))
    assert one.seconds(ROUND) == pytest.approx(3 + 1 + 2 + 1 + 1)
    assert processor_seconds(job(one, torch=True), ROUND) == pytest.approx(2 + 8)


def test_the_busiest_resource_takes_the_time():
    reading = at(job(cost(read=4_000_000_000, written=1_000_000_000, tasks=2e9)), "")
    assert reading.seconds["read"] == pytest.approx(4.0)
    assert reading.seconds["write"] == pytest.approx(2.0)
    assert reading.seconds["compute"] == pytest.approx(1.0, rel=0.01)  # 2 seconds on 2 cores
    assert reading.seconds["total"] == pytest.approx(5.0)
    assert reading.bottleneck == "largest"  # which is all there is
    many = at(job(*[cost(read=400_000_000, tasks=1e8)] * 10), "")
    assert many.bottleneck == "read"


def test_passes_follow_each_other():
    two = job(cost(read=1_000_000_000))
    two = replace(two, phases=[two.phases[0], *two.phases])
    assert at(two, "").seconds["total"] == pytest.approx(1.0 + 2 * 1.0)


def test_a_matrix_needs_one_worker():
    matrix = cost(work=Work(single=1e10), divisible=False)
    assert at(job(matrix, cost(tasks=1e9)), "cores=10").seconds["largest"] == pytest.approx(10.0)
    assert at(job(matrix, item_threads=5), "cores=10").seconds["largest"] == pytest.approx(2.0)
    spread = at(job(*[matrix] * 100), "cores=10", 4)
    assert spread.seconds["compute"] == pytest.approx(25.0)
    assert at(job(*[matrix] * 100), "cores=10", 4096).seconds["total"] == pytest.approx(11.0)


def test_the_network_carries_what_is_on_other_nodes():
    inputs = job(*[cost(read=1_000_000_000)] * 8)
    assert at(inputs, "net=1GB/s").seconds["network"] == 0.0
    assert at(inputs, "net=1GB/s", 4).seconds["network"] == pytest.approx(0.75 * 2.0)
    shared = at(inputs, "net=1GB/s,storage=2GB/s", 4)
    assert shared.seconds["network"] == pytest.approx(2.0)
    assert shared.seconds["read"] == pytest.approx(4.0)
    assert shared.bottleneck == "read"


def test_gpus_compute_or_wait_for_their_link():
    text = "gpus=4,gpu=1TFLOP/s,eigen=1TFLOP/s,memory=1TB/s,link=10GB/s,disk=1TB/s"
    product = cost(work=Work(single=1e13), divisible=False)
    assert at(job(*[product] * 8), text).seconds["compute"] == pytest.approx(20.0)
    moved = cost(read=100_000_000_000)
    assert at(job(*[moved] * 8), text).seconds["compute"] == pytest.approx(20.0)


@pytest.fixture(scope="module")
def ties():
    return plan_shape("llama3-8b", "ties", 2, AMPLE)


@pytest.mark.parametrize("key", ["disk", "net", "memory", "single", "double", "eigen"])
def test_faster_parts_are_never_slower(ties, key):
    unit = "GFLOP/s" if key in ("single", "double", "eigen") else "GB/s"
    totals = [
        Simulation(job_of(ties, look=False), parse_cluster(f"nodes=4,{key}={n}{unit}", Rates(), 2))
        .at(4)
        .seconds["total"]
        for n in (1, 2, 8, 64)
    ]
    assert totals == sorted(totals, reverse=True)


def test_more_nodes_are_never_slower(ties):
    points = Simulation(job_of(ties, look=False), parse_cluster("nodes=24,disk=2GB/s", Rates(), 16)).curve()
    assert [p.nodes for p in points] == [1, 2, 4, 8, 16, 24]
    totals = [p.seconds["total"] for p in points]
    assert totals == sorted(totals, reverse=True)
    first = totals[0]
    assert all(first / p.nodes <= p.seconds["total"] for p in points)  # nobody is more than 100 % efficient


def test_where_nodes_no_longer_help():
    few = Simulation(job(*[cost(read=1_000_000_000)] * 4), parse_cluster("", ROUND, 2)).limit()
    assert few == {"nodes": 4, "why": "largest", "tensor": "t0"}
    shared = Simulation(job(*[cost(read=1_000_000_000)] * 64), parse_cluster("storage=2GB/s", ROUND, 2)).limit()
    assert (shared["nodes"], shared["why"]) == (2, "read")


def test_costs_of_a_real_plan(ties):
    merge = phases(ties)[-1]
    assert sum(c.read for c in merge.costs) == 3 * 2 * 8_030_261_248
    assert sum(c.written for c in merge.costs) == 2 * 8_030_261_248
    asked = phases(ties)[0]
    assert asked.name == "survey"  # signs and magnitudes of the whole model
    assert sum(c.read for p in phases(ties) for c in p.costs) == ties.read_bytes
    kernels = merge_cost(ties.items[0]).kernels
    assert {"entry", "task", "elect", "cut"} <= set(kernels)
    assert kernels["task"] == 2 * kernels["entry"] == 2 * ties.items[0].count


@pytest.mark.parametrize("method", ["linear", "slerp", "della", "tsv_m", "iso_cts", "ace", "regmean", "esm", "fisher"])
def test_methods_on_a_shape(method):
    models = 1 if method == "slerp" else 2
    plan = plan_shape("llama3-8b", method, models, AMPLE)
    facts = simulated(plan, parse_cluster("nodes=2", Rates(), 2))
    assert facts["seconds"]["total"] > 0
    assert json.dumps(facts)


def test_more_models_take_longer():
    totals = [local(plan_shape("llama3-8b", "tsv_m", t, AMPLE), AMPLE, Rates()).seconds["total"] for t in (2, 4, 8, 16)]
    assert totals == sorted(totals)


def test_the_largest_model_is_planned():
    plan = plan_shape("llama3-405b", "ties", 16, AMPLE)
    assert plan.write_bytes == 2 * 405_853_388_800
    facts = simulated(plan, parse_cluster("nodes=16,disk=5GB/s,cores=64", Rates(), 2))
    # 4 passes over 17 models of 812 GB at 80 GB/s together
    assert facts["seconds"]["read"] == pytest.approx(4 * 17 * 811.7 / 80, rel=0.05)


def test_a_recipe_on_a_shape(tmp_path):
    steps = "merge_method: tsv_m\nbase_model: /nowhere/base\nmodels: [{model: /nowhere/a}, {model: /nowhere/b}]\n"
    recipe = Recipe.from_yaml(steps + "calibrate: svc\nexclude: ['lm_head*']\n", models_must_exist=False)
    from pymerge.engine.local import plan_merge

    plan = plan_merge(reshaped(recipe, "llama3-8b"), AMPLE)
    modes = {item.entry.name: item.mode for item in plan.items}
    assert modes["lm_head.weight"] == "copy"
    assert modes["model.layers.0.mlp.up_proj.weight"] == "generic"
    config = tmp_path / "config.json"
    config.write_text(json.dumps(dict(config_of("llama3-8b")) | {"num_hidden_layers": 1}))
    assert len(plan_merge(reshaped(recipe, str(config)), AMPLE).items) == 12


def test_what_cannot_be_planned_by_shape():
    with pytest.raises(InputError, match="neither one of llama3-8b"):
        plan_shape("llama9", "linear", 2, AMPLE)
    with pytest.raises(RecipeError, match="svc is a calibrate step"):
        plan_shape("llama3-8b", "svc", 2, AMPLE)
    with pytest.raises(RecipeError, match="knots merges LoRA adapters"):
        plan_shape("llama3-8b", "knots", 2, AMPLE)


def test_what_is_in_the_page_cache(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100_000)
    assert cached_share([path]) in (0.0, 1.0)  # the file system may not tell
    assert cached_share([tmp_path / "absent"]) == 0.0


def run(*arguments: str):
    from typer.testing import CliRunner

    from pymerge.cli import app

    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_command_line_simulates_a_shape():
    asked = ("--shape", "llama3-8b", "--method", "ties", "--models", "4", "--simulate", "nodes=4,disk=5GB/s")
    facts = json.loads(run(*asked, "--json").stdout)["simulation"]
    assert [point["nodes"] for point in facts["curve"]] == [1, 2, 4]
    assert facts["cluster"]["rates"]["disk"] == {"value": 5e9, "source": "given"}
    shown = run(*asked).stdout
    assert "efficiency" in shown and "5 GB/s" in shown and "not measured" in shown
    plain = json.loads(run(*asked[:6], "--json").stdout)
    assert plain["seconds"]["total"] > 0 and plain["rates"] in ("built in", "measured")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "what is to be planned"),
        (("--simulate", "nodes=2"), "what is to be planned"),
        (("--shape", "llama3-8b"), "--shape: which --method"),
        (("--shape", "llama3-8b", "--method", "ties", "--simulate", "disk=5"), "disk: '5' is no rate"),
    ],
)
def test_options_that_do_not_fit(arguments, message):
    found = run(*arguments)
    assert found.exit_code == 2
    assert message in found.stderr
