"""Forward of mixed attention for sm_90: one warp loads by TMA, two or three warp groups multiply.

A persistent grid: every program takes tiles of rows, the longest of a head first, in a fixed order
or as a counter gives them out, and its loads run ahead from one tile into the next. Products of the
next keys are issued before the softmax of these, whose weights meet their values while those
products run.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..backend import multiprocessors
from ..launch import launch
from ..ops import empty_heads_last
from .config import LOG2_E, HopperForwardConfig
from .hopper import barrier, of_sample, tile_descriptor, tma_store
from .hopper_forward_loads import given, item_of, produce
from .hopper_softmax import (
    LOWEST,
    cut,
    decayed,
    is_raised,
    lane_sums,
    lower,
    make_flag,
    raise_where_large,
    rescale,
    sum_exponent,
    weigh,
    weigh_again,
)
from .operands import by_sample


@gluon.jit
def _leave(out, o_desc, o_tile, batch, head, row):
    """Store a tile of the output; one of 256 columns in two halves through the same place."""
    rows: gl.constexpr = out.shape[0]
    columns: gl.constexpr = o_tile.shape[3]
    parts = (out,)
    if out.shape[1] == 2 * columns:
        parts = gl.split(out.reshape([rows, 2, columns]).permute((0, 2, 1)))
    for i in gl.static_range(out.shape[1] // columns):
        tma.store_wait(0)
        o_tile.reshape([rows, columns]).store(parts[i])
        fence_async_shared()
        tma_store(o_desc, [batch, head, row, i * columns], o_tile)


@gluon.jit
def _pass_over(it, last, past, bars, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Give back tiles of keys and values that others' rows alone see."""
    _q_full, _q_empty, k_full, k_empty, v_full, v_empty, _v_raw, _drawn = bars
    for _ in range(last, past, BLOCK_N):
        slot, phase = it % STAGES, (it // STAGES) & 1
        mbarrier.wait(k_full.index(slot), phase)
        mbarrier.arrive(k_empty.index(slot), count=1)
        mbarrier.wait(v_full.index(slot), phase)
        mbarrier.arrive(v_empty.index(slot), count=1)
        it += 1
    return it


@gluon.jit
def _rows(
    start_row, end_row, row, num_queries, first, past,
    layout: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, SKIP: gl.constexpr,
):  # fmt: skip
    """A warp group's rows, the keys that each of them sees, those that all see, and where their
    tiles of keys end.
    """
    rows = row + gl.arange(0, ROWS, layout)
    inside = rows < num_queries
    row_low = gl.load(start_row + rows, mask=inside, other=0)
    row_high = gl.load(end_row + rows, mask=inside, other=0)
    # Rows past the end are clamped and never stored.
    full_low = gl.load(start_row + gl.minimum(row + ROWS, num_queries) - 1)
    full_high = gl.load(end_row + gl.minimum(row, num_queries - 1))
    last = past
    if SKIP:
        # What these rows see of what the tile sees: one tile at least, none past the end.
        high = gl.load(end_row + gl.minimum(row + ROWS, num_queries) - 1)
        high = gl.where(row < num_queries, high, 0)
        last = gl.minimum(gl.maximum(first + BLOCK_N, gl.cdiv(high, BLOCK_N) * BLOCK_N), past)
    return rows, (row_low, row_high, full_low, full_high), last


@gluon.jit
def _consume(
    operands, HEADS: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, SECTION: gl.constexpr, GROUPS: gl.constexpr, DYNAMIC: gl.constexpr,
    SKIP: gl.constexpr, KEEP_Q: gl.constexpr, TRUST: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """One warp group's share of the rows of every turn."""
    o_desc, lse_ptr, outer, bounds, tiles_smem, bars = operands
    q_smem, k_smem, v_smem, o_smem = tiles_smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _v_raw, drawn = bars
    start, end, num_queries, items = bounds
    ROWS: gl.constexpr = BLOCK_M // GROUPS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    dtype: gl.constexpr = o_desc.dtype
    q_tile = q_smem.index(PART).reshape([ROWS, D])
    left: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    o_tile = o_smem.index(PART)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    if TRUST:
        EXPONENT: gl.constexpr = sum_exponent(dtype)
        flag = make_flag()
    it = 0
    turn = 0
    item = given(drawn, turn) if DYNAMIC else gl.program_id(0)
    while item < items:
        plane, row, _low, _high, first, past = item_of(
            item, items, start, end, num_queries, HEADS, BLOCK_M, BLOCK_N, SECTION
        )
        row += PART * ROWS
        start_row, end_row = of_sample(start, plane // HEADS), of_sample(end, plane // HEADS)
        rows, seen, last = _rows(
            start_row, end_row, row, num_queries, first, past, s_rows, ROWS, BLOCK_N, SKIP
        )
        mbarrier.wait(q_full, turn & 1)
        q = q_tile.load(left) if KEEP_Q else q_tile
        slot = it % STAGES
        mbarrier.wait(k_full.index(slot), (it // STAGES) & 1)
        keys = k_smem.index(slot).reshape([BLOCK_N, D]).permute((1, 0))
        scores = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_empty.index(slot), count=1)
        if KEEP_Q:
            # Not before a product has used it: loads that are still on their way are waited for by
            # their own warp alone, not at the barrier, and the copy engine may write before them.
            mbarrier.arrive(q_empty, count=1)
        scores = cut(scores, first, seen)
        nothing = gl.full([ROWS], LOWEST, gl.float32, s_rows)
        weights, _, top = weigh(scores, nothing, outer)
        total = lane_sums(weights)
        p = gl.convert_layout(weights.to(dtype), p_layout)
        acc = gl.zeros([ROWS, D], gl.float32, o_layout)
        after = it + 1
        more = first + BLOCK_N < last
        mbarrier.wait(k_full.index(after % STAGES), (after // STAGES) & 1, pred=more)
        for n in range(first + BLOCK_N, last, BLOCK_N):
            before = it % STAGES
            phase = (it // STAGES) & 1
            it += 1
            slot = it % STAGES
            keys = k_smem.index(slot).reshape([BLOCK_N, D]).permute((1, 0))
            scores = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), phase)
            values = v_smem.index(before).reshape([BLOCK_N, D])
            acc = warpgroup_mma(p, values, acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            scores = cut(scores, n, seen)
            if TRUST:
                weights = gl.exp2(scores * outer - top[:, None])
                sums = lane_sums(weights)
            else:
                mbarrier.arrive(k_empty.index(slot), count=1)
                weights, decay, top = weigh(scores, top, outer)
                sums = lane_sums(weights)
                total = decayed(total, decay)
            after = it + 1
            more = n + BLOCK_N < last
            mbarrier.wait(k_full.index(after % STAGES), (after // STAGES) & 1, pred=more)
            if TRUST:
                raise_where_large(flag, sums, EXPONENT)
            acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
            # For the flag too: seen by all once it is raised.
            barrier()
            mbarrier.arrive(v_empty.index(before), count=1)
            if not TRUST:
                acc = rescale(acc, gl.convert_layout(decay, o_rows))
            elif is_raised(flag):
                lower(flag)
                # Into the registers of the weights, which are of no use.
                scores = warpgroup_mma(q, keys, weights, use_acc=False, is_async=True)
                scores = cut(warpgroup_mma_wait(0, deps=[scores]), n, seen)
                weights, decay, top = weigh_again(scores, sums, top, outer, EXPONENT)
                sums = lane_sums(weights)
                total = decayed(total, decay)
                acc = acc * gl.convert_layout(decay, o_rows)[:, None]
            if TRUST:
                mbarrier.arrive(k_empty.index(slot), count=1)
            total += sums
            p = gl.convert_layout(weights.to(dtype), p_layout)
        if not KEEP_Q:
            mbarrier.arrive(q_empty, count=1)
        slot = it % STAGES
        mbarrier.wait(v_full.index(slot), (it // STAGES) & 1)
        acc = warpgroup_mma(p, v_smem.index(slot).reshape([BLOCK_N, D]), acc, is_async=True)
        total = gl.convert_layout(gl.sum(total, 1), s_rows)
        share = 1.0 / gl.where(total == 0.0, 1.0, total)
        place = plane.to(gl.int64) * num_queries + rows
        gl.store(lse_ptr + place, top + gl.log2(total), mask=rows < num_queries)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(slot), count=1)
        it += 1
        if SKIP:
            it = _pass_over(it, last, past, bars, BLOCK_N, STAGES)
        acc = acc * gl.convert_layout(share, o_rows)[:, None]
        _leave(acc.to(dtype), o_desc, o_tile, plane // HEADS, plane % HEADS, row)
        turn += 1
        item = given(drawn, turn) if DYNAMIC else item + gl.num_programs(0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_queries", "items"])
def _mixed_attention_fwd_hopper_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, counter_ptr, start, end, outer, num_queries, items,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SECTION: gl.constexpr, GROUPS: gl.constexpr,
    DYNAMIC: gl.constexpr, SKIP: gl.constexpr, KEEP_Q: gl.constexpr, TRUST: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """(BLOCK_M, D) tiles of the output, ``items`` in all; grid = (multiprocessors,).

    ``start`` and ``end``: see ``of_sample``. Only DYNAMIC needs the counter, a zero: which program
    computes a tile has no influence on its result.
    """
    rows: gl.constexpr = BLOCK_M // GROUPS
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, rows, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    # Of 256 columns, half a tile of the output is all there is room for.
    columns: gl.constexpr = 128 if D == 256 else D
    o_smem = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, rows, columns], o_desc.layout)
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], layout)
    v_raw = gl.allocate_shared_memory(gl.int64, [1], layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    # Not made where nobody waits for it: see the kernel of the backward.
    item_full = k_full
    if DYNAMIC:
        item_full = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
        mbarrier.init(item_full.index(0), count=1)
        mbarrier.init(item_full.index(1), count=1)
    item_smem = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=GROUPS)
    mbarrier.init(v_raw, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    # The barriers must be seen by the copy engine before the first copy.
    fence_async_shared()
    tiles_smem = (q_smem, k_smem, v_smem, o_smem)
    drawn = (item_full, item_smem)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, v_raw, drawn)
    bounds = (start, end, num_queries, items)
    consumed = (o_desc, lse_ptr, outer, bounds, tiles_smem, bars)
    produced = (q_desc, k_desc, v_desc, counter_ptr, bounds, tiles_smem, bars)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    consumed, HEADS, D, BLOCK_M, BLOCK_N, STAGES, SECTION, GROUPS, DYNAMIC, SKIP,
                    KEEP_Q, TRUST, 0,
                )),
                (_consume, (
                    consumed, HEADS, D, BLOCK_M, BLOCK_N, STAGES, SECTION, GROUPS, DYNAMIC, SKIP,
                    KEEP_Q, TRUST, 1,
                )),
                (produce, (
                    produced, HEADS, GROUP, D, BLOCK_M, BLOCK_N, STAGES, SECTION, GROUPS, DYNAMIC,
                )),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.static_assert(GROUPS == 3)
        gl.warp_specialize(
            [
                (_consume, (
                    consumed, HEADS, D, BLOCK_M, BLOCK_N, STAGES, SECTION, GROUPS, DYNAMIC, SKIP,
                    KEEP_Q, TRUST, 0,
                )),
                (_consume, (
                    consumed, HEADS, D, BLOCK_M, BLOCK_N, STAGES, SECTION, GROUPS, DYNAMIC, SKIP,
                    KEEP_Q, TRUST, 1,
                )),
                (_consume, (
                    consumed, HEADS, D, BLOCK_M, BLOCK_N, STAGES, SECTION, GROUPS, DYNAMIC, SKIP,
                    KEEP_Q, TRUST, 2,
                )),
                (produce, (
                    produced, HEADS, GROUP, D, BLOCK_M, BLOCK_N, STAGES, SECTION, GROUPS, DYNAMIC,
                )),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


# All that ``hopper_fwd`` launches.
KERNELS = (_mixed_attention_fwd_hopper_kernel,)


def hopper_fwd(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, scale: float,
    picked: HopperForwardConfig,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and base-2 log-sum-exp."""
    batch, heads, length, dim = q.shape
    out = empty_heads_last(q)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    rows, block_n = picked.block_m // picked.groups, picked.block_n
    items = triton.cdiv(length, picked.block_m) * batch * heads
    programs = min(items, multiprocessors(q.device.index))
    bounds = tuple(zip(*by_sample(start, end), strict=True))
    counter = lse
    if picked.dynamic:
        # One of its own for every launch: graphs that are replayed and streams side by side.
        counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    launch(
        _mixed_attention_fwd_hopper_kernel, (programs, 1, 1),
        (tile_descriptor(q, rows), tile_descriptor(k, block_n), tile_descriptor(v, block_n),
         tile_descriptor(out, rows, min(dim, 128)), lse, counter, *bounds, scale * LOG2_E, length,
         items),
        {"HEADS": heads, "GROUP": heads // k.shape[1], "D": dim, **picked.constants()},
        num_warps=4,
    )  # fmt: skip
    return out, lse
