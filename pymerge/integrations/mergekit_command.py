"""The command `pymerge-mergekit-yaml`: mergekit's own `mergekit-yaml`, with pymerge's methods in its registry."""
# pyright: reportMissingImports=false

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from pymerge.errors import MergeError, RecipeError
from pymerge.methods.names import nearest
from pymerge.recipe.problems import Problems

ACCELERATE = "Rank magnitudes in mergekit's ties, breadcrumbs and della by pymerge's operators."


def main() -> None:
    """mergekit-yaml's arguments, and --accelerate-stock."""
    try:
        from pymerge.integrations.mergekit import register
    except ImportError as error:
        sys.exit(f"pymerge-mergekit-yaml: {error}")
    import click
    import yaml
    from mergekit.scripts.run_yaml import main as theirs

    def run(accelerate_stock: bool, config_file: str, **options: Any) -> None:
        register(accelerate_stock)
        with open(config_file, encoding="utf-8") as file:
            check_config(yaml.safe_load(file), config_file)
        assert theirs.callback is not None
        theirs.callback(config_file=config_file, **options)

    flag = click.Option(["--accelerate-stock"], is_flag=True, help=ACCELERATE)
    command = type(theirs)("pymerge-mergekit-yaml", params=[*theirs.params, flag], callback=run, help=__doc__)
    try:
        command()
    except MergeError as error:
        print(f"pymerge-mergekit-yaml: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def check_config(config: Any, source: str) -> None:
    """What mergekit passes over: parameters that the method does not have, and lists where text is meant."""
    from mergekit.merge_methods import registry

    from pymerge.integrations.mergekit import PREFIX, PymergeMethod, not_registered

    name = config.get("merge_method") if isinstance(config, dict) else None
    if not isinstance(name, str) or not name.startswith(PREFIX):
        return
    known = {method.spec.name: method for method in registry.registered_methods()}
    method = known.get(name)
    if method is None:
        reason = not_registered().get(name.removeprefix(PREFIX))
        raise RecipeError(
            f"{source}: {name}: mergekit gives one tensor at a time, {name.removeprefix(PREFIX)} {reason}"
            if reason
            else f"{source}: unknown method {name!r}: {nearest(name, known)}"
        )
    assert isinstance(method, PymergeMethod)
    names = [parameter.name for parameter in method.spec.parameters]
    of_models = [parameter.name for parameter in method.spec.input_parameters]
    problems = Problems(source)
    for parameters, of_model in parameters_in(config):
        for key, value in parameters.items():
            if key not in names and key not in method.combine.ignored:
                problems.unknown("parameters", key, names, "parameter")
            elif key in names and of_model and key not in of_models:
                problems.add(key, "has one value for all models: move it to the parameters of the merge")
            if key in ("purify", "calibrate") and isinstance(value, list) and all(isinstance(v, str) for v in value):
                problems.add(key, f"a list chooses by depth; several steps are one text: {', '.join(value)}")
    problems.raise_if_any()


def parameters_in(config: Any) -> Iterator[tuple[dict[str, Any], bool]]:
    """The mappings called `parameters`, wherever they are, and whether each is of one model."""
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        if key == "parameters" and isinstance(value, dict):
            yield value, "model" in config
        elif isinstance(value, dict | list):
            yield from parameters_in(value)
