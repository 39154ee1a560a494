"""The product of the costs for sm_90: copying warps, and two multiplying warp groups.

The plain kernel of kernel.py adds its partial sums while the tensor cores wait. Here each of two
warp groups owns 64 rows of a tile and runs at its own pace, so that one adds while the other
multiplies, and four more warps copy: pool rows by TMA, token rows by 16-byte copies, because they
may lie anywhere. A program walks over tiles; the copies of a tile start during the one before.

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

_NO_INDEX = gl.constexpr(2**31 - 1)
# Renamed between triton 3.6 and 3.9.
_load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_load_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def _tile_place(tile, rows, m, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    """Row and column tile: GROUP_M row tiles share a column tile in the L2."""
    tiles_m, tiles_n = gl.cdiv(rows, BLOCK_M), gl.cdiv(m, BLOCK_N)
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    height = gl.minimum(tiles_m - first, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first + within % height, within // height


@gluon.jit
def _copy_tiles(
    pointers, pool_desc, buffers, sizes,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):  # fmt: skip
    """The copying warps."""
    tokens_ptr, offset_ptr, _, _, _, _ = pointers
    x_smem, p_smem, full, empty = buffers
    rows, m, dim = sizes
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    offs_k = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
    step = 0
    tiles = gl.cdiv(rows, BLOCK_M) * gl.cdiv(m, BLOCK_N)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_m, tile_n = _tile_place(tile, rows, m, BLOCK_M, BLOCK_N, GROUP_M)
        row = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
        offset = gl.load(offset_ptr + row, mask=row < rows, other=-1)
        depth = gl.where(gl.max(offset, axis=0) >= 0, dim, 0)
        # A row that does not exist reads row 0 and its result is dropped.
        start = gl.multiple_of(gl.maximum(offset, 0), 8)
        x_ptrs = tokens_ptr + start[:, None] + offs_k[None, :]
        for k in range(0, depth, BLOCK_K):
            slot = step % STAGES
            bar = full.index(slot)
            mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
            mbarrier.expect(bar, BLOCK_N * BLOCK_K * 2)
            _load_box(pool_desc, [tile_n * BLOCK_N, k], bar, p_smem.index(slot))
            _load_rows(x_smem.index(slot), x_ptrs)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            x_ptrs += BLOCK_K
            step += 1


@gluon.jit
def _half_product(x, p, HALF: gl.constexpr, LAYOUT: gl.constexpr, COLS: gl.constexpr):
    """Product of this group's 64 rows with COLS rows of the pool's stage, summed from zero."""
    p = p.slice(HALF * COLS, COLS).permute((1, 0))
    part = gl.zeros([64, COLS], gl.float32, layout=LAYOUT)
    part = hopper.warpgroup_mma(x, p, part, use_acc=False, is_async=True)
    return hopper.warpgroup_mma_wait(0, deps=[part])


@gluon.jit
def _store_costs(pointers, sizes, acc, row, first_n, LAYOUT: gl.constexpr, METRIC: gl.constexpr):
    """Turn products into costs and write them."""
    _, offset_ptr, x_norm_ptr, p_norm_ptr, out_ptr, _ = pointers
    rows, m, _ = sizes
    live = gl.load(offset_ptr + row, mask=row < rows, other=-1) >= 0
    x_norm = gl.load(x_norm_ptr + row, mask=live, other=0.0)
    col = first_n + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    p_norm = gl.load(p_norm_ptr + col, mask=col < m, other=0.0)
    if METRIC == "cosine":
        cost = 1.0 - acc * x_norm[:, None] * p_norm[None, :]
    else:
        cost = (x_norm[:, None] + p_norm[None, :]) - 2.0 * acc
    # Not maximum(), which would turn the NaN of a bad input into a perfect match.
    cost = gl.where(cost < 0.0, 0.0, cost)
    if METRIC == "l2":
        cost = gl.sqrt(cost)
    cost = gl.where(live[:, None], cost, 0.0)
    places = out_ptr + row.to(gl.int64)[:, None] * m + col[None, :]
    gl.store(places, cost, mask=(row < rows)[:, None] & (col < m)[None, :])


@gluon.jit
def _half_best(pointers, sizes, acc, first_n, LAYOUT: gl.constexpr, METRIC: gl.constexpr):
    """Lowest score of each row and the lowest column that has it. NaN never wins."""
    m = sizes[1]
    col = first_n + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    p_norm = gl.load(pointers[3] + col, mask=col < m, other=0.0)
    score = -acc * p_norm[None, :] if METRIC == "cosine" else p_norm[None, :] - 2.0 * acc
    score = gl.where((col < m)[None, :] & (score == score), score, float("inf"))
    best = gl.min(score, axis=1)
    chosen = (score == best[:, None]) & (score < float("inf"))
    return best, gl.min(gl.where(chosen, col[None, :], _NO_INDEX), axis=1)


@gluon.jit
def _multiply_tiles(
    pointers, buffers, sizes, PART: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr, CORRECTION: gl.constexpr, METRIC: gl.constexpr,
    NEAREST: gl.constexpr,
):  # fmt: skip
    """A multiplying warp group: rows PART * BLOCK_M / 2 and on of every tile, in two halves."""
    offset_ptr, out_ptr, index_ptr = pointers[1], pointers[4], pointers[5]
    x_smem, p_smem, full, empty = buffers
    rows, m, dim = sizes
    half_m: gl.constexpr = BLOCK_M // 2
    gl.static_assert(half_m == 64)
    half_n: gl.constexpr = BLOCK_N // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, half_n, 16])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    step = 0
    tiles = gl.cdiv(rows, BLOCK_M) * gl.cdiv(m, BLOCK_N)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_m, tile_n = _tile_place(tile, rows, m, BLOCK_M, BLOCK_N, GROUP_M)
        whole = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, layout=line)
        offset = gl.load(offset_ptr + whole, mask=whole < rows, other=-1)
        depth = gl.where(gl.max(offset, axis=0) >= 0, dim, 0)
        acc0 = gl.zeros([half_m, half_n], gl.float32, layout=layout)
        acc1 = gl.zeros([half_m, half_n], gl.float32, layout=layout)
        for _ in range(0, depth, BLOCK_K):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            # The copies of tokens write through another proxy than wgmma reads.
            hopper.fence_async_shared()
            x = x_smem.index(slot).slice(PART * half_m, half_m)
            part = _half_product(x, p_smem.index(slot), 0, layout, half_n)
            acc0 = gl.fma(part, gl.full_like(part, CORRECTION), acc0)
            part = _half_product(x, p_smem.index(slot), 1, layout, half_n)
            mbarrier.arrive(empty.index(slot))
            acc1 = gl.fma(part, gl.full_like(part, CORRECTION), acc1)
            step += 1
        row = tile_m * BLOCK_M + PART * half_m
        row += gl.arange(0, half_m, layout=gl.SliceLayout(1, layout))
        first_n = tile_n * BLOCK_N
        if NEAREST:
            best0, index0 = _half_best(pointers, sizes, acc0, first_n, layout, METRIC)
            best1, index1 = _half_best(pointers, sizes, acc1, first_n + half_n, layout, METRIC)
            later = best1 < best0
            place = tile_n.to(gl.int64) * rows + row
            gl.store(out_ptr + place, gl.where(later, best1, best0), mask=row < rows)
            live = gl.load(offset_ptr + row, mask=row < rows, other=-1) >= 0
            index = gl.where(live, gl.where(later, index1, index0), _NO_INDEX)
            gl.store(index_ptr + place, index, mask=row < rows)
        else:
            _store_costs(pointers, sizes, acc0, row, first_n, layout, METRIC)
            _store_costs(pointers, sizes, acc1, row, first_n + half_n, layout, METRIC)


@gluon.jit
def _token_cost_hopper_kernel(
    pool_desc, pointers, sizes,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr, CORRECTION: gl.constexpr, METRIC: gl.constexpr,
    NEAREST: gl.constexpr, MULTIPLY_REGISTERS: gl.constexpr, COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Costs, or each row's best column per tile, of (BLOCK_M, BLOCK_N) tiles in turn.

    pointers: tokens, offsets, token norms, pool norms, result (costs or scores), columns.
    sizes: rows, columns, components. grid = (min(tiles, multiprocessors),).
    """
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    x_smem = gl.allocate_shared_memory(pool_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], shared)
    p_smem = gl.allocate_shared_memory(pool_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], shared)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        # One arrival announces the bytes of the TMA copy, each of 128 threads its own copies.
        mbarrier.init(full.index(i), count=1 + 128)
        mbarrier.init(empty.index(i), count=2)
    buffers = (x_smem, p_smem, full, empty)
    gl.warp_specialize(
        [
            (_multiply_tiles, (
                pointers, buffers, sizes, 0, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M,
                CORRECTION, METRIC, NEAREST,
            )),
            (_multiply_tiles, (
                pointers, buffers, sizes, 1, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M,
                CORRECTION, METRIC, NEAREST,
            )),
            (_copy_tiles, (
                pointers, pool_desc, buffers, sizes, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
                GROUP_M,
            )),
        ],
        [4, 4], [MULTIPLY_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def launch(
    tokens: Tensor,
    pool: Tensor,
    operands: tuple[Tensor | None, ...],
    rows: int,
    picked: HopperCostConfig,
    metric: str,
) -> None:
    """Run the kernel; ``operands`` are its pointers after the tokens."""
    m, dim = pool.shape
    box, layout = [picked.block_n, picked.block_k], gl.NVMMASharedLayout(128, 16, rank=2)
    descriptor = TensorDescriptor(pool, [m, dim], [pool.stride(0), 1], box, layout)
    tiles = triton.cdiv(rows, picked.block_m) * triton.cdiv(m, picked.block_n)
    _token_cost_hopper_kernel[(min(tiles, _multiprocessors(tokens.device.index)),)](
        descriptor, (tokens, *operands), (rows, m, dim),
        METRIC=metric, NEAREST=operands[-1] is not None, num_warps=4, **picked.constants(),
    )  # fmt: skip
