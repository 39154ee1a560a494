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
    # In units of 2^-23: what a step loses by truncation, on average.
    correction: int = 0


# Parts in which the sm_90 kernel sums the squares of a token for costs: see hopper_norms.py.
PARTS = 8


@dataclass(frozen=True)
class HopperCostConfig:
    """Shape of the warp-specialised kernel for sm_90; see hopper.py.

    ``block_k`` components are one copy and summed inside the tensor core, after which
    ``correction`` units of 2^-23 make up for its truncation. Token rows of a tile have
    ``token_slots`` in shared memory, halves of its pool rows ``pool_slots``. A program sums the
    squares of ``share`` pool rows at a time.
    """

    block_k: int
    token_slots: int
    pool_slots: int
    group_m: int
    correction: int
    block_m: int = 128
    block_n: int = 256
    share: int = 16

    def constants(self, nearest: bool) -> dict[str, object]:
        """Compile-time constants of the kernel for nearest rows or costs that a config determines.

        Four groups of 128 threads share 512 registers per thread. Those that sum the squares of
        tokens for costs need them (H200: 216 and 40 take 3 % longer).
        """
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "TOKEN_SLOTS": self.token_slots,
            "POOL_SLOTS": self.pool_slots,
            "GROUP_M": self.group_m,
            "CORRECTION": 1.0 + self.correction * 2.0**-23,
            "SHARE": self.share,
            "MULTIPLY_REGISTERS": 216 if nearest else 200,
            "OTHER_REGISTERS": 40 if nearest else 56,
        }


# From offline compilation for each architecture: registers, spills, shared memory.
_HOPPER_16 = CostConfig(128, 128, 64, 8, 8, 4, 1)
_HOPPER_16_SMALL = CostConfig(128, 64, 64, 8, 8, 3, 1)
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


# H100, docs/matching_trials.md: three slots for tokens beat two by 1 %, steps of 128 beat 64 by
# 17 %, groups of 16 row tiles beat 8 by 1.5 % (128 images; 4 and 33 lose).
HOPPER = HopperCostConfig(128, 3, 4, 16, 2)


def pick_hopper(
    arch: int, dtype: torch.dtype, rows: int, pool_size: int, dim: int, aligned: bool
) -> HopperCostConfig | None:
    """The warp-specialised kernel's shape, or None where the plain kernel has to do.

    It has no small tile for calls that can't fill the chip. ``aligned``: rows of tokens and pool
    start at multiples of 16 bytes.
    """
    whole = dim > 0 and dim % HOPPER.block_k == 0
    if arch != 90 or dtype == torch.float32 or not (aligned and whole):
        return None
    return HOPPER if pick_config(arch, dtype, rows, pool_size, dim) == _HOPPER_16 else None


def one_matrix(shape: tuple[int, int, int], strides: tuple[int, int]) -> bool:
    """Whether (B, N, C) tokens are rows at one stride that don't overlap, as TMA reads them."""
    images, length, dim = shape
    return strides[1] >= dim and (images == 1 or strides[0] == length * strides[1])


def candidates(dtype: torch.dtype) -> tuple[CostConfig, ...]:
    """The shapes that a tuning run should time."""
    if dtype == torch.float32:
        return (_FLOAT32, CostConfig(64, 64, 32, 8, 8, 3), CostConfig(64, 64, 32, 8, 4, 3))
    return tuple(
        CostConfig(block_m, half_n, block_k, group_m, 8, stages, block_k // 64)
        for block_m, half_n in ((128, 128), (128, 64))
        for block_k in (32, 64)
        for group_m in (4, 8, 16)
        for stages in (3, 4)
    )
