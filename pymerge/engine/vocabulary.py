"""The models of a recipe with the rows of one vocabulary, where the recipe asks for one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pymerge.checkpoint.header import name_list
from pymerge.engine.alignment import sources
from pymerge.errors import RecipeError
from pymerge.recipe import Recipe

if TYPE_CHECKING:
    from pymerge.engine.local import Inputs


def with_vocabulary(recipe: Recipe, inputs: Inputs) -> Inputs:
    """The inputs as `tokenizer_source`, `tokenizer`, `chat_template` and `relax: {vocabulary: truncate}` say."""
    if not recipe.other_rows and recipe.chat_template is None:
        return inputs
    if (components := inputs.reference.components) and "" not in components:
        raise RecipeError(
            "tokenizers, chat templates and vocabulary rows are of one model: merge the folder of one component "
            f"({name_list(list(components))}) with these keys, or leave them out"
        )
    if recipe.other_rows:
        if recipe.sequential:
            what = f"{recipe.method} runs each model behind merged layers, with its own tokens"
            raise RecipeError(f"{what}: not with other vocabulary rows")
        if recipe.align is not None:
            raise RecipeError("align finds units of models of one vocabulary: not with other vocabulary rows")
    from pymerge.vocabulary.build import Member, common_rows, rebuilt, with_template

    members = [Member(ref, model) for ref, model in sources(recipe, inputs)]
    if recipe.vocabulary is not None:
        base = 0 if recipe.base is not None else None
        views, new = rebuilt(recipe.vocabulary, recipe.chat_template, members, base)
    else:
        views, new = common_rows(members) if recipe.other_rows else ([m.model for m in members], None)
        if recipe.chat_template is not None:
            template = with_template(recipe.chat_template, members)
            new = template if new is None else template.beside(new)
    view = {id(member.model): seen for member, seen in zip(members, views, strict=True)}
    return replace(
        inputs,
        base=view[id(inputs.base)] if inputs.base is not None else None,
        models=tuple(view[id(model)] for model in inputs.models),
        vocabulary=new,
        config_changes={**inputs.config_changes, **(new.config if new is not None else {})},
    )
