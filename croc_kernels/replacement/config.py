"""Tile shapes of the loss kernel: frozen data and one pure function that picks them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LossConfig:
    """Components that a program of the forward kernel reads at a time, its warps, programs."""

    columns: int
    warps: int
    programs: int


def pick_loss(selected: bool) -> LossConfig:
    """The shape; ``selected``: not all rows count."""
    # H100, docs/matching.md. Blocks of selected rows are full: half as many programs fill the chip.
    return LossConfig(1024, 4, 792 if selected else 1584)
