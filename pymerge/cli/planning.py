"""What `pymerge plan` makes of its options."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from pymerge.errors import RecipeError

if TYPE_CHECKING:
    from pymerge.engine.cluster import Cluster
    from pymerge.engine.plan import Options, Plan
    from pymerge.recipe import Recipe

MODELS = 2
AMPLE = 1 << 44  # bytes: of models without weights the plan says what it takes, and not what is here


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options that say what is planned."""

    recipe: Recipe | None
    simulate: str | None
    shape: str | None
    method: str | None
    models: int | None

    @property
    def nothing(self) -> bool:
        """Nothing to plan: a calibration alone."""
        return self.recipe is None and self.shape is None

    def check(self, calibrate: bool) -> None:
        """Raises RecipeError where the options do not fit together."""
        alone = [name for name in ("simulate", "method", "models") if getattr(self, name) is not None]
        if self.nothing and (alone or not calibrate):
            raise RecipeError("what is to be planned? Give a RECIPE, or --shape with a --method")
        if self.recipe is not None and (self.method is not None or self.models is not None):
            raise RecipeError("--method and --models are in place of a RECIPE: give one or the other")
        if self.recipe is None and self.shape is not None and self.method is None:
            raise RecipeError("--shape: which --method? Or give a RECIPE, whose models then have that shape")


def calibrated(as_json: bool) -> None:
    """Measures this machine, keeps the rates, and shows them."""
    from pymerge.engine.calibrate import calibrate
    from pymerge.engine.describe_simulation import show_rates

    rates = calibrate()
    file = str(rates.save())
    if as_json:
        print(json.dumps(asdict(rates) | {"file": file}, indent=1))
    else:
        show_rates(rates, file)


def planned(asked: Asked, options: Options) -> tuple[Plan, Options, Cluster | None]:
    """The plan, as a node of the cluster has it."""
    from pymerge.engine.cluster import parse_cluster
    from pymerge.engine.local import plan_merge
    from pymerge.engine.rates import known_rates
    from pymerge.engine.shape_plan import plan_shape, reshaped

    cluster = None
    if asked.simulate is not None:
        cluster = parse_cluster(asked.simulate, known_rates(), options.thread_count)
        options = replace(options, threads=cluster.gpus or cluster.cores)
    if asked.shape is None:
        assert asked.recipe is not None
        return plan_merge(asked.recipe, options), options, cluster
    if options.memory is None:
        options = replace(options, memory=AMPLE)
    if asked.recipe is not None:
        return plan_merge(reshaped(asked.recipe, asked.shape), options), options, cluster
    assert asked.method is not None
    return plan_shape(asked.shape, asked.method, asked.models or MODELS, options), options, cluster


def said(asked: Asked, plan: Plan, options: Options, cluster: Cluster | None, as_json: bool) -> None:
    """Prints the plan, or what is simulated."""
    from pymerge.engine.describe import describe_plan, show_plan
    from pymerge.engine.describe_simulation import show_simulation
    from pymerge.engine.simulate import simulated

    made_up = asked.shape is not None
    if cluster is None:
        if as_json:
            print(json.dumps(describe_plan(plan, options, made_up=made_up), indent=1))
        else:
            show_plan(plan, options, made_up=made_up)
        return
    facts = simulated(plan, cluster)
    if as_json:
        print(json.dumps(describe_plan(plan, options, made_up=made_up) | {"simulation": facts}, indent=1))
    else:
        show_simulation(facts)
