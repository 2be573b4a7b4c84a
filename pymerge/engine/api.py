"""`pymerge.merge`: one function for models in memory and on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pymerge import recipe
from pymerge.engine.local import merge_to_disk
from pymerge.engine.plan import Options
from pymerge.errors import RecipeError

Engine = Literal["local", "ray"]


class Recipe(recipe.Recipe):
    """A merge as data: `Recipe.from_yaml("recipe.yaml").run("merged/")`."""

    def run(
        self, out: str | Path, options: Options | None = None, *, engine: Engine = "local", address: str | None = None
    ) -> dict[str, Any]:
        """Merge from disk into the folder `out`; the summary is returned and written to out/merge.json.

        engine   ray: on the Ray cluster at `address` (auto, or HOST:PORT; None: one that runs here, else a new one);
                 memory and threads of the options are then those of one worker"""
        if engine == "local":
            return merge_to_disk(self, out, options)
        from pymerge.engine.on_ray import merge_on_ray

        return merge_on_ray(self, out, options, address=address)


def merge(
    base: Any,
    models: Sequence[Any],
    *,
    method: str,
    out: str | Path | None = None,
    as_adapter: int | bool = False,
    options: Options | None = None,
    engine: Engine = "local",
    address: str | None = None,
    **parameters: Any,
) -> Any:
    """Merge fine-tuned models (and their base, or None) into one.

    base, models  all paths (Hugging Face folders or .safetensors files): streamed from disk to the folder `out`;
                  or all state dicts or nn.Modules: merged in memory, inputs untouched
    method        a name of pymerge.methods.list()
                  (PEFT adapter folders are models too: of the base given, else of the base that they name)
    as_adapter    the result is a LoRA adapter of the base: of this rank, or, True, of that of the merged adapters
    options       memory budget, threads, device, overwriting (pymerge.Options)
    engine        ray: folders are merged on the Ray cluster at `address`; see Recipe.run
    parameters    hyperparameters of the method (one value, or a list with one a model), `purify`, `calibrate`, `dtype`,
                  `out_dtype`, `exclude`, `include`, `seed`, `relax`, `tokenizer_source`, `tokenizer`, `chat_template`;
                  see pymerge.methods.describe(method).
                  `align`: what find_permutations returned, its file, or {"method": "mudsc", "data": batches, ...} with
                  its options, to find them first; models come in the order of the base, or of the first where none is
    Returns       the summary that is also written to out/merge.json; in memory a new state dict, or a new module where
                  modules came in (entries of dtype as in the base unless `dtype` is given)
    Raises        MergeError: a wrong recipe or input, before anything is computed; NonFinite, Overflow; OutputError
    Cost          each input is read once; tensors above half of the memory budget more often if ranked."""
    given = [*([base] if base is not None else []), *models]
    on_disk = [isinstance(model, str | os.PathLike) for model in given]
    if any(on_disk) and not all(on_disk):
        raise RecipeError("base and models must be all paths or all models in memory")
    if all(on_disk) and out is None:
        raise RecipeError("merging folders needs out=: the folder to write")
    if engine != "local" and (as_adapter is not False or not all(on_disk)):
        raise RecipeError(f"the engine {engine} merges folders into a whole model")
    described = Recipe.from_kwargs(base, models, method, **parameters)
    if as_adapter is not False and out is not None and all(on_disk):
        from pymerge.engine.adapter_out import merge_to_adapter

        return merge_to_adapter(described, out, None if as_adapter is True else as_adapter, options)
    if as_adapter is not False:
        raise RecipeError("as_adapter= is for models on disk and needs out=")
    if out is not None and all(on_disk):
        return described.run(out, options, engine=engine, address=address)
    if out is not None:
        raise RecipeError("out= is for models on disk: save the merged state dict yourself, or give paths")
    from pymerge.engine.memory import merge_in_memory

    return merge_in_memory(described, options)
