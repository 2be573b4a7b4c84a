"""One of the two programs on many YAMLs, in one process: their start takes longer than these merges.

    python benchmarks/side_by_side/parity_worker.py pymerge|mergekit MODELS OUT YAML...

Each YAML goes through the program's own command line, with MODELS as the working directory; the result is OUT/NAME, or
what went wrong in OUT/NAME.error.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

SEED = 1


def mergekit(cache: Path) -> Callable[[Path, Path], None]:
    from mergekit.scripts.run_yaml import main

    # Without a network its model card fails: it asks the hub for every model.
    options = ["--quiet", "--no-write-model-card", "--random-seed", str(SEED), "--lora-merge-cache", str(cache)]

    def run(recipe: Path, out: Path) -> None:
        main.main([str(recipe), str(out), *options], standalone_mode=False)

    return run


def pymerge(_: Path) -> Callable[[Path, Path], None]:
    from pymerge.cli import app

    def run(recipe: Path, out: Path) -> None:
        status = app(["merge", str(recipe), str(out)], standalone_mode=False)
        if status:
            raise RuntimeError(f"exit status {status}")

    return run


def main(program: str, models: Path, out: Path, recipes: list[Path]) -> None:
    out.mkdir(parents=True)
    os.chdir(models)
    run = {"mergekit": mergekit, "pymerge": pymerge}[program](out / "adapters")
    for recipe in recipes:
        try:
            run(recipe, out / recipe.stem)
        except (Exception, SystemExit) as error:
            text = str(error) or traceback.format_exc()
            (out / f"{recipe.stem}.error").write_text(f"{type(error).__name__}: {text}\n")


if __name__ == "__main__":
    given, *paths = sys.argv[1:]
    folder, result, *yamls = (Path(path).resolve() for path in paths)
    main(given, folder, result, yamls)
