"""A merge as one checked object: what is merged, by which steps, with which values for which tensor. No torch."""

from pymerge.recipe.layers import Layers, layer_depths, layer_positions
from pymerge.recipe.recipe import ModelRef, Recipe, Steps

__all__ = ["Layers", "ModelRef", "Recipe", "Steps", "layer_depths", "layer_positions"]
