"""The released results of golden/mudsc, by the rule of its README: equal where it says exact, else by the objective."""

from __future__ import annotations

import pytest
import torch

from pymerge.align import Clusters, Permutations, Units
from pymerge.align.api import permuted
from pymerge.align.match import blocks_of, match
from pymerge.align.moments import moments, similarities
from pymerge.align.solve import Solver
from pymerge.align.sweeps import Options
from pymerge.align.weights import WeightSimilarity
from pymerge.align.zip import zip_units
from pymerge.align.zip_search import ZipSolver
from tests.align.golden import Golden
from tests.golden.cases import FOLDER

FILES = sorted((FOLDER / "mudsc").glob("*.safetensors"))
GOLDEN = {path.stem: path for path in FILES}
MERGED = 2e-5  # relative error of a merged parameter
OBJECTIVE = 1e-5


def of(level: str, mode: str) -> list[str]:
    return [
        stem
        for stem, path in GOLDEN.items()
        if (g := Golden(path)).params["mode"] == mode and level in g.metadata["level"]
    ]


def read(stem: str) -> Golden:
    return Golden(GOLDEN[stem])


def options(golden: Golden) -> Options:
    given = golden.params
    return Options(alpha=given["alpha"], max_sweeps=given["max_iter"], patience=given["tol"], seed=given["seed"])


def solved(golden: Golden) -> Permutations:
    """By the solver, from the activation similarities of the file."""
    weights = WeightSimilarity(golden.spec, golden.models, cosine=False, memory=1 << 24)
    seen = [golden.activations(t) for t in range(golden.params["T"] - 1)]
    solver = Solver(golden.spec, weights if golden.params["alpha"] else None, seen, options(golden))
    labels = tuple(f"task{t}" for t in range(golden.params["T"]))
    return permuted(solver, solver.run(golden.params["activation_init"]), {"spec": golden.spec, "models": labels})


def check_merged(golden: Golden, units: Permutations | Clusters, expected: dict[str, torch.Tensor]) -> None:
    for name, answer in expected.items():
        aligned = [units.aligned(name, model[name].load(), t) for t, model in enumerate(golden.models)]
        mean = torch.stack(aligned).double().mean(0)
        assert torch.linalg.vector_norm(mean - answer) <= MERGED * torch.linalg.vector_norm(answer.double()), name


def test_there_are_golden_files() -> None:
    assert FILES, f"no golden files in {FOLDER / 'mudsc'}"


@pytest.mark.parametrize("stem", of("assignment", "permute"))
def test_assignment(stem: str) -> None:
    golden = read(stem)
    group = Units(name="g0", size=golden.params["n"], entries=(), blocks=golden.params["groups"])
    width = group.size // group.blocks
    for t, scores in enumerate(golden.tensors["sim/g0"]):
        found = match(group, {"units": scores}, threshold=1e-6)
        index = found.index["units"]
        assert index.sort().values.tolist() == list(range(group.size))
        blocks = index.view(group.blocks, width) // width
        assert torch.equal(blocks, blocks[:, :1].expand_as(blocks)), "a block is torn"
        matched = float(scores[torch.arange(group.size), index].double().mean())
        assert matched >= golden.objective["per_task"][t] - OBJECTIVE
        assert found.values[0] == pytest.approx(matched, abs=1e-7)
        assert found.gap is not None and 0 <= found.gap <= 1e-6
        if golden.exact:
            assert torch.equal(index, golden.tensors["perm/g0"][t + 1])


@pytest.mark.parametrize("stem", of("zip", "zip"))
def test_clusters(stem: str) -> None:
    golden = read(stem)
    given = golden.params
    group = Units(name="g0", size=given["n"], entries=(), blocks=given["groups"])
    found = zip_units(group, golden.tensors["sim_full/g0"], given["T"], given["a"], given["b"])
    assert torch.equal(found.clusters, golden.tensors["cluster/g0"])
    assert found.values[0] == pytest.approx(golden.objective["mean_merged_similarity"], abs=1e-6)


@pytest.mark.parametrize("stem", of("models", "permute"))
def test_permuted_models(stem: str) -> None:
    golden = read(stem)
    found = solved(golden)
    found.check()
    assert found.report["after"] >= golden.objective["final_mean"] - OBJECTIVE
    if not golden.exact:  # `merged` then is what this solver's own permutations give: there is nothing to compare with
        return
    for name, answer in golden.under("perm/").items():
        assert torch.equal(found.index[name]["units"], answer), name
    check_merged(golden, found, golden.under("merged/"))
    assert found.report["after"] == pytest.approx(golden.objective["final_mean"], abs=1e-6)
    assert found.report["before"] == pytest.approx(golden.objective["identity_mean"], abs=1e-6)
    for name, after in golden.objective["final_per_group"].items():
        assert sum(found.report["groups"][name]["after"]) / (golden.params["T"] - 1) == pytest.approx(after, abs=1e-6)


@pytest.mark.parametrize("stem", [stem for stem in of("models", "permute") if "vit" in stem])
def test_tied_heads_find_the_same_where_the_released_orders_agree(stem: str) -> None:
    golden = read(stem)
    pairs = {"g1": "g2"}  # (q, k) and v of the one layer
    seen = []
    for t in range(golden.params["T"] - 1):
        given = golden.activations(t)
        seen.append({name: found for name, found in given.items() if name not in (*pairs, *pairs.values())})
        seen[-1] |= {qk: {"k": given[qk]["units"], "v": given[v]["units"]} for qk, v in pairs.items()}
    weights = WeightSimilarity(golden.tied, golden.models, cosine=False, memory=1 << 24)
    solver = Solver(golden.tied, weights if golden.params["alpha"] else None, seen, options(golden))
    for t, placed in enumerate(solver.run(True).state, 1):
        for name, found in placed.items():
            assert torch.equal(found.index.get("units", found.index.get("k")), golden.tensors[f"perm/{name}"][t])
            if name in pairs:
                assert torch.equal(found.index["v"], golden.tensors[f"perm/{pairs[name]}"][t])


@pytest.mark.parametrize("stem", of("models", "zip"))
def test_zipped_models(stem: str) -> None:
    golden = read(stem)
    given = golden.params
    seen = golden.under("intermediate/act_sim_full/")
    solver = ZipSolver(
        golden.spec, golden.models, seen, options(golden), cosine=False, decay=given["a"], budget=given["b"]
    )
    found = solver.run(from_activations=True)
    assert max(found.objectives) == pytest.approx(golden.objective["reported_best_mean"], abs=1e-6)
    for name, answer in golden.under("cluster/").items():
        assert torch.equal(found.state[0][name].clusters, answer), name
    index = {name: {"units": place.clusters} for name, place in found.state[0].items()}
    check_merged(golden, Clusters(spec=golden.spec, index=index, models=("a", "b")), golden.under("merged/"))


@pytest.mark.parametrize("stem", [stem for stem in GOLDEN if read(stem).under("acts/")])
def test_correlations_of_activations(stem: str) -> None:
    """Of the samples that the released hooks collected, through the formula that streamed sums go through."""
    golden = read(stem)
    for group in golden.spec.groups:
        one, other = (golden.tensors[f"acts/task{t}/{group.name}"].double() for t in range(2))
        blocks = blocks_of(group)
        of_each = tuple(moments(len(x), x.sum(0), x.square().sum(0), cosine=False) for x in (one, other))
        gram = {"units": (one.T @ other).float()}
        found = similarities(blocks, blocks.sets[0], gram, of_each)["units"]
        expected = golden.tensors[f"intermediate/act_sim/{group.name}"][0]
        assert (found - expected).abs().max() < 1e-5
