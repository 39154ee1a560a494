"""Shapes and orders of the replacement and loss kernels' programs: frozen data, pure functions."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LossConfig:
    """Components that a program of the forward kernel reads at a time, its warps, its rows.

    While the selected rows are listed, the first ``clearing`` programs clear the first ``head``
    rows where they do not count.
    """

    columns: int
    warps: int
    rows: int
    head: int
    clearing: int


def pick_loss(element_size: int) -> LossConfig:
    """The shape for operands of at most so many bytes per component: 4 KiB of a row at a time."""
    # H200, docs/matching_trials.md: 2 rows in place of 4 gain 1 % at 32 x 2048, 1 loses 12 %.
    return LossConfig(4096 // element_size, 4, 2, 8192, 1056)


def place_sums(tiles: int, sums: int) -> tuple[int, int, int]:
    """Programs of the backward of replacement; tiles ahead of the first sum, and per sum then.

    45 % of the tiles run ahead, beside the sort that the sums wait for.
    """
    if tiles == 0 or sums == 0:
        return tiles + sums, tiles, 0
    lead = tiles * 9 // 20
    ratio = max(1, (tiles - lead) // sums)
    return max(tiles + sums, lead + sums * (ratio + 1)), lead, ratio
