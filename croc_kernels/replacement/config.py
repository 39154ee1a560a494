"""Shapes and orders of the replacement and loss kernels' programs: frozen data, pure functions."""

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


def place_sums(tiles: int, sums: int) -> tuple[int, int, int]:
    """Programs of the backward of replacement; tiles ahead of the first sum, and per sum then.

    Half of the tiles run ahead, beside the sort that the sums wait for.
    """
    if tiles == 0 or sums == 0:
        return tiles + sums, tiles, 0
    lead = tiles // 2
    ratio = max(1, (tiles - lead) // sums)
    return max(tiles + sums, lead + sums * (ratio + 1)), lead, ratio
