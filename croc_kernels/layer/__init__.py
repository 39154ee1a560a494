"""The Croc layer: masking, matching, replacement, heads and loss, put together by recipe."""

from .croc_layer import CrocLayer, Replacement
from .recipe_config import RECIPES, Recipe

__all__ = ["RECIPES", "CrocLayer", "Recipe", "Replacement"]
