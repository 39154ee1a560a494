"""Tile shapes of the cost kernels: frozen data and one pure function that picks them."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CostConfig:
    """Shape of one program of the product.

    A program computes a (block_m, 2 * half_n) tile as two halves that share the token operand. Two
    halves, because every block_k products are added to a second accumulator with a rounded float32
    addition (see kernel.py): a half's partial sums and the whole tile's sums fit into 255
    registers, two whole tiles do not.
    """

    block_m: int
    half_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


# From offline compilation for each architecture (registers, spills, shared memory). Speed is not
# measured yet.
_HOPPER_16 = CostConfig(128, 128, 64, 8, 8, 4)
_HOPPER_16_SMALL = CostConfig(128, 64, 64, 8, 8, 3)
_AMPERE_16 = CostConfig(128, 64, 32, 8, 8, 4)
_BLACKWELL_16 = CostConfig(128, 64, 64, 8, 8, 3)
# The masks of a ragged last step take registers that the other shapes do not have.
_RAGGED_16 = CostConfig(128, 64, 32, 8, 8, 3)
_FLOAT32 = CostConfig(128, 64, 32, 8, 8, 3)
# Three tf32 products hold their operands in registers where there is no wgmma.
_AMPERE_FLOAT32 = CostConfig(64, 32, 32, 8, 8, 3)

# Multiprocessors of an H100 SXM or H200, each of which runs one program of either Hopper shape.
_MULTIPROCESSORS = 132


def _time(config: CostConfig, rows: int, pool_size: int) -> int:
    """Rounds of programs over the chip, weighted by the width of a tile."""
    tiles = -(-rows // config.block_m) * -(-pool_size // (2 * config.half_n))
    return -(-tiles // _MULTIPROCESSORS) * config.half_n


def pick_config(arch: int, dtype: torch.dtype, rows: int, pool_size: int, dim: int) -> CostConfig:
    """The tile shape for one call.

    Args:
        arch: compute capability times ten, 90 for an H200.
        dtype: of the tokens and of the pool.
        rows: rows of the cost matrix, all images together.
        pool_size: its columns.
        dim: components per token.
    """
    if dtype == torch.float32:
        return _FLOAT32 if arch >= 90 else _AMPERE_FLOAT32
    if arch < 90:
        return _AMPERE_16
    if dim % _HOPPER_16.block_k:
        return _RAGGED_16
    if arch >= 100:
        return _BLACKWELL_16
    # For the same products the small tile reads 4 / 3 as much from the L2, which bounds both.
    large, small = (_time(shape, rows, pool_size) for shape in (_HOPPER_16, _HOPPER_16_SMALL))
    return _HOPPER_16 if 3 * large <= 4 * small else _HOPPER_16_SMALL


def candidates(dtype: torch.dtype) -> tuple[CostConfig, ...]:
    """The shapes that a tuning run should time."""
    if dtype == torch.float32:
        return (_FLOAT32, CostConfig(64, 64, 32, 8, 8, 3), CostConfig(64, 64, 32, 8, 4, 3))
    return tuple(
        CostConfig(block_m, half_n, block_k, group_m, 8, stages)
        for block_m, half_n in ((128, 128), (128, 64))
        for block_k in (32, 64)
        for group_m in (4, 8, 16)
        for stages in (3, 4)
    )
