"""The product of the costs for sm_90: copying warps, two multiplying warp groups, one of norms.

The plain kernel of kernel.py adds its partial sums while the tensor cores wait. Here each of two
warp groups owns 64 rows of a tile and runs at its own pace, so that one adds while the other
multiplies; further warps copy, by TMA, but for token rows that lie anywhere, which take 16-byte
copies. Tokens and halves of the pool's rows have slots of their own, so that a half's slot is free
as soon as both groups have multiplied it. A program walks over tiles; the copies of a tile start
during the one before.

A third group hands norms to the other two through shared memory: see hopper_norms.py.

Sums stay inside the tensor core for BLOCK_K components. What their truncation loses is proportional
to the sum on average, and CORRECTION gives that back: see kernel.py.
"""

import functools

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .config import HopperCostConfig
from .hopper_norms import (
    _pool_norm_kernel,
    cost_norms,
    group_barrier,
    nearest_norms,
    pool_norms,
)
from .hopper_results import best_columns, better, lower_keys, spread_pool, store_costs
from .hopper_rows import row_state, tile_depth, tile_place

# Renamed between triton 3.6 and 3.9.
_load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_load_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def _copy_tiles(
    pointers, descriptors, buffers, sizes,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, TOKEN_SLOTS: gl.constexpr,
    POOL_SLOTS: gl.constexpr, GROUP_M: gl.constexpr, DENSE: gl.constexpr,
):  # fmt: skip
    """The copying warps: four, or one where TMA reads the tokens too."""
    x_smem, p_smem, x_full, x_empty, p_full, p_empty = buffers[:6]
    half_n: gl.constexpr = BLOCK_N // 2
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    step = 0
    tiles = gl.cdiv(sizes[0], BLOCK_M) * gl.cdiv(sizes[1], BLOCK_N)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_m, tile_n = tile_place(tile, sizes[0], sizes[1], BLOCK_M, BLOCK_N, GROUP_M)
        depth = sizes[2]
        if not DENSE:
            depth = tile_depth(tile_m, pointers, sizes, BLOCK_M, BLOCK_K)
            offs_k = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
            row = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
            offset, _live, _valid = row_state(row, pointers, sizes)
            # A row that does not exist reads row 0 and its result is dropped.
            start = gl.multiple_of(offset, 8)
        for k in range(0, depth, BLOCK_K):
            slot = step % TOKEN_SLOTS
            bar = x_full.index(slot)
            mbarrier.wait(x_empty.index(slot), (step // TOKEN_SLOTS & 1) ^ 1)
            if DENSE:
                mbarrier.expect(bar, BLOCK_M * BLOCK_K * 2)
                _load_box(descriptors[1], [tile_m * BLOCK_M, k], bar, x_smem.index(slot))
            else:
                places = start[:, None] + (k + offs_k)[None, :]
                _load_rows(x_smem.index(slot), pointers[0] + places)
                async_copy.mbarrier_arrive(bar, increment_count=False)
            for h in gl.static_range(2):
                half = 2 * step + h
                slot = half % POOL_SLOTS
                bar = p_full.index(slot)
                mbarrier.wait(p_empty.index(slot), (half // POOL_SLOTS & 1) ^ 1)
                mbarrier.expect(bar, half_n * BLOCK_K * 2)
                first_n = tile_n * BLOCK_N + h * half_n
                if len(p_smem.shape) > 3:
                    place = [first_n // 16, 0, 0, 0, k]
                    _load_box(descriptors[0], place, bar, p_smem.index(slot))
                else:
                    _load_box(descriptors[0], [first_n, k], bar, p_smem.index(slot))
            step += 1


@gluon.jit
def _half_product(x, p, COLS: gl.constexpr, LAYOUT: gl.constexpr):
    """Product of this group's 64 rows with a slot of the pool, summed from zero."""
    if len(p.shape) > 2:
        p = p.reshape([COLS, x.shape[1]])
    part = gl.zeros([64, COLS], gl.float32, layout=LAYOUT)
    part = hopper.warpgroup_mma(x, p.permute((1, 0)), part, use_acc=False, is_async=True)
    return hopper.warpgroup_mma_wait(0, deps=[part])


@gluon.jit
def _multiply_tiles(
    pointers, buffers, sizes, PART: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, TOKEN_SLOTS: gl.constexpr,
    POOL_SLOTS: gl.constexpr, GROUP_M: gl.constexpr, CORRECTION: gl.constexpr, METRIC: gl.constexpr,
    NEAREST: gl.constexpr, DENSE: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """A multiplying warp group: rows PART * BLOCK_M / 2 and on of every tile, in two halves."""
    x_smem, p_smem, x_full, x_empty, p_full, p_empty, x_line, p_line, full, empty = buffers
    half_m: gl.constexpr = BLOCK_M // 2
    gl.static_assert(half_m == 64)
    half_n: gl.constexpr = BLOCK_N // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, half_n, 16])
    step, count = 0, 0
    tiles = gl.cdiv(sizes[0], BLOCK_M) * gl.cdiv(sizes[1], BLOCK_N)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_m, tile_n = tile_place(tile, sizes[0], sizes[1], BLOCK_M, BLOCK_N, GROUP_M)
        acc0 = gl.zeros([half_m, half_n], gl.float32, layout=layout)
        acc1 = gl.zeros([half_m, half_n], gl.float32, layout=layout)
        factor = gl.full_like(acc0, CORRECTION)
        for _ in range(0, tile_depth(tile_m, pointers, sizes, BLOCK_M, BLOCK_K), BLOCK_K):
            slot = step % TOKEN_SLOTS
            low, high = 2 * step % POOL_SLOTS, (2 * step + 1) % POOL_SLOTS
            phase = 2 * step // POOL_SLOTS & 1
            mbarrier.wait(x_full.index(slot), step // TOKEN_SLOTS & 1)
            mbarrier.wait(p_full.index(low), phase)
            if not DENSE:
                # The copies of tokens write through another proxy than wgmma reads.
                hopper.fence_async_shared()
            x = x_smem.index(slot).slice(PART * half_m, half_m)
            part = _half_product(x, p_smem.index(low), half_n, layout)
            mbarrier.arrive(p_empty.index(low))
            acc0 = gl.fma(part, factor, acc0)
            mbarrier.wait(p_full.index(high), phase)
            part = _half_product(x, p_smem.index(high), half_n, layout)
            mbarrier.arrive(p_empty.index(high))
            mbarrier.arrive(x_empty.index(slot))
            acc1 = gl.fma(part, factor, acc1)
            step += 1
        row = tile_m * BLOCK_M + PART * half_m
        row += gl.arange(0, half_m, layout=gl.SliceLayout(1, layout))
        first_n = tile_n * BLOCK_N
        mbarrier.wait(full, count & 1)
        if NEAREST:
            best, index = best_columns(acc0, p_line, 0, half_n, layout, METRIC)
            other, column = best_columns(acc1, p_line, half_n, half_n, layout, METRIC)
            best, index = better(best, index, other, column)
            lower_keys(pointers, sizes, best, index, row, first_n)
        else:
            norms = x_line.slice(PART * half_m, half_m).load(gl.SliceLayout(1, layout))
            store_costs(pointers, sizes, acc0, row, norms, p_line, first_n, 0, half_n, METRIC, EVEN)
            store_costs(
                pointers, sizes, acc1, row, norms, p_line, first_n, half_n, half_n, METRIC, EVEN
            )
        # All threads have read the norms and lowered their keys.
        group_barrier()
        mbarrier.arrive(empty)
        count += 1


@gluon.jit
def _norms(
    pointers, buffers, sizes,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, TOKEN_SLOTS: gl.constexpr,
    GROUP_M: gl.constexpr, METRIC: gl.constexpr, NEAREST: gl.constexpr, DENSE: gl.constexpr,
    EVEN: gl.constexpr, SHARE: gl.constexpr,
):  # fmt: skip
    """The warp group of norms."""
    if NEAREST:
        nearest_norms(pointers, buffers, sizes, BLOCK_M, BLOCK_N, GROUP_M, METRIC, EVEN, SHARE)
    else:
        cost_norms(
            pointers, buffers, sizes, BLOCK_M, BLOCK_N, BLOCK_K, TOKEN_SLOTS, GROUP_M, METRIC,
            DENSE, EVEN, SHARE,
        )  # fmt: skip


@gluon.jit
def _token_cost_hopper_kernel(
    pool_desc, token_desc, pointers, sizes,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, TOKEN_SLOTS: gl.constexpr,
    POOL_SLOTS: gl.constexpr, GROUP_M: gl.constexpr, CORRECTION: gl.constexpr, METRIC: gl.constexpr,
    NEAREST: gl.constexpr, DENSE: gl.constexpr, EVEN: gl.constexpr, SHARE: gl.constexpr,
    MULTIPLY_REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Costs, or columns of the lowest, of (BLOCK_M, BLOCK_N) tiles in turn.

    Without DENSE there is no ``token_desc``: rows of tokens lie apart. pointers, sizes: see
    hopper_rows.py. For the nearest row the result starts as NO_KEY.
    grid = (programs,), at most one per multiprocessor.
    """
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    dtype: gl.constexpr = pool_desc.dtype
    x_smem = gl.allocate_shared_memory(dtype, [TOKEN_SLOTS, BLOCK_M, BLOCK_K], shared)
    box: gl.constexpr = pool_desc.block_type.shape
    p_smem = gl.allocate_shared_memory(dtype, [POOL_SLOTS] + box, pool_desc.layout)  # noqa: RUF005
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    x_full = gl.allocate_shared_memory(gl.int64, [TOKEN_SLOTS, 1], bars)
    x_empty = gl.allocate_shared_memory(gl.int64, [TOKEN_SLOTS, 1], bars)
    p_full = gl.allocate_shared_memory(gl.int64, [POOL_SLOTS, 1], bars)
    p_empty = gl.allocate_shared_memory(gl.int64, [POOL_SLOTS, 1], bars)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    x_line = gl.allocate_shared_memory(gl.float32, [BLOCK_M], line)
    p_line = gl.allocate_shared_memory(gl.float32, [BLOCK_N], line)
    full = gl.allocate_shared_memory(gl.int64, [1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [1], bars)
    for i in gl.static_range(TOKEN_SLOTS):
        # One arrival announces the bytes of a TMA copy, each of 128 threads its own copies.
        mbarrier.init(x_full.index(i), count=1 if DENSE else 128)
        mbarrier.init(x_empty.index(i), count=2 if NEAREST else 3)
    for i in gl.static_range(POOL_SLOTS):
        mbarrier.init(p_full.index(i), count=1)
        mbarrier.init(p_empty.index(i), count=2)
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=2)
    buffers = (x_smem, p_smem, x_full, x_empty, p_full, p_empty, x_line, p_line, full, empty)
    # Written out twice: triton 3.6 lets no name stand for a tuple that holds METRIC.
    if DENSE and not NEAREST:
        gl.warp_specialize(
            [
                (_multiply_tiles, (
                    pointers, buffers, sizes, 0, BLOCK_M, BLOCK_N, BLOCK_K, TOKEN_SLOTS, POOL_SLOTS,
                    GROUP_M, CORRECTION, METRIC, NEAREST, DENSE, EVEN,
                )),
                (_multiply_tiles, (
                    pointers, buffers, sizes, 1, BLOCK_M, BLOCK_N, BLOCK_K, TOKEN_SLOTS, POOL_SLOTS,
                    GROUP_M, CORRECTION, METRIC, NEAREST, DENSE, EVEN,
                )),
                (_norms, (
                    pointers, buffers, sizes, BLOCK_M, BLOCK_N, BLOCK_K, TOKEN_SLOTS, GROUP_M,
                    METRIC, NEAREST, DENSE, EVEN, SHARE,
                )),
                (pool_norms, (pointers, sizes, SHARE, METRIC, 2)),
                (_copy_tiles, (
                    pointers, (pool_desc, token_desc), buffers, sizes, BLOCK_M, BLOCK_N, BLOCK_K,
                    TOKEN_SLOTS, POOL_SLOTS, GROUP_M, DENSE,
                )),
            ],
            [4, 4, 2, 1], [MULTIPLY_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply_tiles, (
                    pointers, buffers, sizes, 0, BLOCK_M, BLOCK_N, BLOCK_K, TOKEN_SLOTS, POOL_SLOTS,
                    GROUP_M, CORRECTION, METRIC, NEAREST, DENSE, EVEN,
                )),
                (_multiply_tiles, (
                    pointers, buffers, sizes, 1, BLOCK_M, BLOCK_N, BLOCK_K, TOKEN_SLOTS, POOL_SLOTS,
                    GROUP_M, CORRECTION, METRIC, NEAREST, DENSE, EVEN,
                )),
                (_norms, (
                    pointers, buffers, sizes, BLOCK_M, BLOCK_N, BLOCK_K, TOKEN_SLOTS, GROUP_M,
                    METRIC, NEAREST, DENSE, EVEN, SHARE,
                )),
                (_copy_tiles, (
                    pointers, (pool_desc, token_desc), buffers, sizes, BLOCK_M, BLOCK_N, BLOCK_K,
                    TOKEN_SLOTS, POOL_SLOTS, GROUP_M, DENSE,
                )),
            ],
            [4, 4, 1 if DENSE else 4], [MULTIPLY_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
        )  # fmt: skip


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


_LAYOUT = gl.NVMMASharedLayout(128, 16, rank=2)


def sum_pool(
    pool: Tensor, p_norm: Tensor, state: Tensor, sizes: tuple[int, ...], metric: str
) -> None:
    """Launch the norms of the pool, and what sets ``state``, before costs of gathered rows."""
    states = state.numel()
    _pool_norm_kernel[(max(sizes[1], triton.cdiv(states, 32)),)](
        pool, p_norm, state, states, sizes, METRIC=metric, num_warps=1
    )


def launch(
    operands: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    picked: HopperCostConfig,
    metric: str,
    dense: bool,
) -> None:
    """Run the kernel; ``operands`` and ``sizes`` as in hopper_rows.py.

    ``dense``: row i of the result is row i of the tokens, at one stride.
    """
    tokens, pool, out = operands[0], operands[3], operands[5]
    rows, m, dim, _, _, _, stride_n, stride_pm = sizes
    nearest, even = out.dtype == torch.int64, m % picked.block_n == 0
    if even and not nearest:
        pool_desc = spread_pool(pool, picked)
    else:
        box = [picked.block_n // 2, picked.block_k]
        pool_desc = TensorDescriptor(pool, [m, dim], [stride_pm, 1], box, _LAYOUT)
    token_desc = None
    if dense:
        box = [picked.block_m, picked.block_k]
        token_desc = TensorDescriptor(tokens, [rows, dim], [stride_n, 1], box, _LAYOUT)
    # Programs without a tile sum squares of the pool.
    programs = _multiprocessors(tokens.device.index)
    _token_cost_hopper_kernel[(programs,)](
        pool_desc, token_desc, operands, sizes,
        METRIC=metric, DENSE=dense, EVEN=even, NEAREST=nearest, num_warps=4,
        **picked.constants(nearest),
    )  # fmt: skip
