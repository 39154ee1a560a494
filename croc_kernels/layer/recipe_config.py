"""The recipes of the token-reconstruction stage that exist in the wild, as data."""

from dataclasses import dataclass
from fractions import Fraction

from ..checks import check_choice


@dataclass(frozen=True)
class Recipe:
    """What distinguishes one published stage from another; everything else is common.

    Attributes:
        name: what ``recipe=`` takes.
        matching: ``"hungarian"`` (distinct pool rows, smallest total distance) or ``"nearest"``
            (repeats allowed).
        attention: ``"visual"`` (each image bidirectional, text causal), ``"prefix"`` (all keys
            before the first supervised label are visible to all rows) or ``"causal"``.
        loss_over: the reconstruction loss runs over the ``"masked"`` tokens or over ``"all"``
            tokens of the images.
        head: ``"linear"``, or ``"bert"``: position embedding, one BERT layer, linear.

    Raises:
        ValueError: a field has a value that is not listed here.
    """

    name: str
    matching: str = "hungarian"
    attention: str = "visual"
    loss_over: str = "masked"
    head: str = "linear"

    def __post_init__(self) -> None:
        check_choice("Recipe", "matching", self.matching, ("hungarian", "nearest"))
        check_choice("Recipe", "attention", self.attention, ("visual", "prefix", "causal"))
        check_choice("Recipe", "loss_over", self.loss_over, ("masked", "all"))
        check_choice("Recipe", "head", self.head, ("linear", "bert"))


RECIPES = {
    recipe.name: recipe
    for recipe in (
        # The paper: arXiv 2410.14332.
        Recipe("croc"),
        # The code released with it, deepglint/Croc.
        Recipe(
            "croc-released", matching="nearest", attention="prefix", loss_over="all", head="bert"
        ),
        # Its successor, deepglint/Victor.
        Recipe("victor", attention="causal", loss_over="all"),
    )
}


def get_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe of that name; a :class:`Recipe` of one's own passes through.

    Raises:
        ValueError: the name is unknown.
    """
    if isinstance(recipe, Recipe):
        return recipe
    check_choice("CrocLayer", "recipe", recipe, tuple(RECIPES))
    return RECIPES[recipe]


def ratio_terms(ratio: float) -> tuple[int, int]:
    """Numerator and denominator of the ratio as it is written in decimal.

    0.1 * 30 is 3.0000000000000004 in binary floating point, and its ceiling 4; a tenth of 30 tokens
    is 3.
    """
    return Fraction(str(ratio)).as_integer_ratio()


def masked_count(length: int, terms: tuple[int, int]) -> int:
    """``ceil(ratio * length)`` in integers."""
    numerator, denominator = terms
    return (numerator * length + denominator - 1) // denominator
