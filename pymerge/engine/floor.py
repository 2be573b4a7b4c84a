"""How long a merge takes without arithmetic: reads all inputs and writes the output with the same reader and writer.

    python -m pymerge.engine.floor RECIPE OUT [--threads N] [--memory BYTES]

For benchmarks: OUT is not a model, it holds the bytes of the base."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from pymerge import _C
from pymerge.checkpoint import StagedOutput
from pymerge.engine.execute import Executor, Stop
from pymerge.engine.local import identity, opened_plan
from pymerge.engine.piece import Piece
from pymerge.engine.pipeline import Segment
from pymerge.engine.plan import Options
from pymerge.engine.progress import NoProgress
from pymerge.recipe import Recipe


class Floor(Executor):
    """Writes what lies where the output would be."""

    def answer(self, piece: Piece) -> _C.DeltaParams | None:
        return None

    def merge(self, piece: Piece, params: _C.DeltaParams | None) -> Segment:
        return Segment(piece.item.entry.name, piece.first * piece.item.out_width, piece.out_view, 0)


def main(recipe_path: str, out: str, options: Options) -> None:
    recipe = Recipe.from_yaml(Path(recipe_path))
    with opened_plan(recipe, options) as (inputs, plan):
        items = tuple(replace(item, mode="held" if item.mode == "held" else "tiles") for item in plan.items)
        plan = replace(plan, items=items, surveys=(), questions=(), purify_questions=(), observed=())
        staged = StagedOutput(
            Path(out), plan.layout, identity(recipe, inputs, options, plan), overwrite=True, resume=False
        )
        Floor(plan, staged, threads=options.thread_count, progress=NoProgress(), stop=Stop()).run()
        staged.commit(lambda folder: None)


if __name__ == "__main__":
    arguments = dict(zip(sys.argv[3::2], sys.argv[4::2], strict=True))
    main(
        sys.argv[1],
        sys.argv[2],
        Options(
            threads=int(arguments["--threads"]) if "--threads" in arguments else None,
            memory=int(arguments["--memory"]) if "--memory" in arguments else None,
        ),
    )
