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

from .config import LOG2_E, HopperForwardConfig, by_sample
from .hopper import barrier, of_sample, tile_descriptor, tma_load, tma_store
from .hopper_softmax import cut, lane_sums, rescale, weigh


@gluon.jit
def _give_out(item, drawn, turn):
    """Tell the multiplying warps which item is next. There are two places for it: what was in this
    one has been read, since the loading warp comes here only after Q of the turn before is free.
    """
    full, smem = drawn
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    smem.index(turn & 1).store(gl.full([1], 0, gl.int32, layout) + item)
    mbarrier.arrive(full.index(turn & 1), count=1)


@gluon.jit
def _given(drawn, turn):
    """The item of a turn, from the loading warp."""
    full, smem = drawn
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mbarrier.wait(full.index(turn & 1), (turn >> 1) & 1)
    return gl.max(smem.index(turn & 1).load(layout), 0)


@gluon.jit
def _item(
    item, items, start, end, num_queries,
    HEADS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SECTION: gl.constexpr,
):  # fmt: skip
    """Head, first row and keys of one turn. SECTION heads share a stretch of turns, last rows
    first: their keys stay in the L2, and the tiles with most keys don't end the grid.
    """
    tiles = gl.cdiv(num_queries, BLOCK_M)
    part = item // (tiles * SECTION)
    within = item % (tiles * SECTION)
    size = gl.minimum(SECTION, items // tiles - part * SECTION)
    plane = part * SECTION + within % size
    row = (tiles - 1 - within // size) * BLOCK_M
    last_row = gl.minimum(row + BLOCK_M, num_queries) - 1
    start_row, end_row = of_sample(start, plane // HEADS), of_sample(end, plane // HEADS)
    low, high = gl.load(start_row + row), gl.load(end_row + last_row)
    first = low // BLOCK_N * BLOCK_N
    # At least one tile of keys, so that both sides count the same: all of it is masked then.
    past = gl.maximum(first + BLOCK_N, gl.cdiv(high, BLOCK_N) * BLOCK_N)
    return plane, row, low, high, first, past


@gluon.jit
def _keep_rows(tile, n, low, high, D: gl.constexpr, BLOCK_N: gl.constexpr):
    """Zero the rows of a tile of values outside [low, high), which may hold NaN: 0 * NaN = NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    keys = n + gl.arange(0, 8, gl.SliceLayout(1, layout))
    for i in gl.static_range(BLOCK_N // 8):
        part = tile.slice(8 * i, 8, 0)
        seen = (keys + 8 * i >= low) & (keys + 8 * i < high)
        values = part.load(layout)
        part.store(gl.where(seen[:, None], values, gl.zeros_like(values)))
    fence_async_shared()
    barrier()


@gluon.jit
def _produce(
    operands, HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SECTION: gl.constexpr, GROUPS: gl.constexpr,
    DYNAMIC: gl.constexpr,
):  # fmt: skip
    """Bring every turn's tile of Q, then its keys and values tile by tile."""
    q_desc, k_desc, v_desc, counter_ptr, bounds, tiles_smem, bars = operands
    q_smem, k_smem, v_smem, _o_smem = tiles_smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty, v_raw, drawn = bars
    start, end, num_queries, items = bounds
    it = 0
    raw = 0
    turn = 0
    item = gl.program_id(0)
    while item < items:
        if DYNAMIC:
            _give_out(item, drawn, turn)
        plane, row, low, high, first, past = _item(
            item, items, start, end, num_queries, HEADS, BLOCK_M, BLOCK_N, SECTION
        )
        batch, head = plane // HEADS, plane % HEADS
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, q_desc.block_type.nbytes * GROUPS)
        for i in gl.static_range(GROUPS):
            tma_load(
                q_desc, [batch, head, row + i * (BLOCK_M // GROUPS), 0], q_full, q_smem.index(i)
            )
        for n in range(first, past, BLOCK_N):
            slot = it % STAGES
            phase = (it // STAGES) & 1
            bar = k_full.index(slot)
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            mbarrier.expect(bar, k_desc.block_type.nbytes)
            tma_load(k_desc, [batch, head // GROUP, n, 0], bar, k_smem.index(slot))
            bar = v_full.index(slot)
            mbarrier.wait(v_empty.index(slot), phase ^ 1)
            if (n >= low) & (n + BLOCK_N <= high):
                mbarrier.expect(bar, v_desc.block_type.nbytes)
                tma_load(v_desc, [batch, head // GROUP, n, 0], bar, v_smem.index(slot))
            else:
                mbarrier.expect(v_raw, v_desc.block_type.nbytes)
                tma_load(v_desc, [batch, head // GROUP, n, 0], v_raw, v_smem.index(slot))
                mbarrier.wait(v_raw, raw & 1)
                raw += 1
                tile = v_smem.index(slot).reshape([BLOCK_N, D])
                _keep_rows(tile, n, low, high, D, BLOCK_N)
                mbarrier.arrive(bar, count=1)
            it += 1
        turn += 1
        item = gl.num_programs(0) + (
            gl.atomic_add(counter_ptr, 1, sem="relaxed") if DYNAMIC else item
        )
    if DYNAMIC:
        _give_out(item, drawn, turn)


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
def _consume(
    operands, HEADS: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, SECTION: gl.constexpr, GROUPS: gl.constexpr, DYNAMIC: gl.constexpr,
    SKIP: gl.constexpr, KEEP_Q: gl.constexpr, PART: gl.constexpr,
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
    it = 0
    turn = 0
    item = _given(drawn, turn) if DYNAMIC else gl.program_id(0)
    while item < items:
        plane, row, _low, _high, first, past = _item(
            item, items, start, end, num_queries, HEADS, BLOCK_M, BLOCK_N, SECTION
        )
        row += PART * ROWS
        rows = row + gl.arange(0, ROWS, s_rows)
        inside = rows < num_queries
        start_row, end_row = of_sample(start, plane // HEADS), of_sample(end, plane // HEADS)
        row_low = gl.load(start_row + rows, mask=inside, other=0)
        row_high = gl.load(end_row + rows, mask=inside, other=0)
        # What all of these rows see; rows past the end are clamped and never stored.
        full_low = gl.load(start_row + gl.minimum(row + ROWS, num_queries) - 1)
        full_high = gl.load(end_row + gl.minimum(row, num_queries - 1))
        last = past
        if SKIP:
            # What these rows see of what the tile sees: one tile at least, none past the end.
            high = gl.load(end_row + gl.minimum(row + ROWS, num_queries) - 1)
            high = gl.where(row < num_queries, high, 0)
            last = gl.minimum(gl.maximum(first + BLOCK_N, gl.cdiv(high, BLOCK_N) * BLOCK_N), past)

        mbarrier.wait(q_full, turn & 1)
        if KEEP_Q:
            q = q_tile.load(left)
            mbarrier.arrive(q_empty, count=1)
        else:
            q = q_tile
        slot = it % STAGES
        mbarrier.wait(k_full.index(slot), (it // STAGES) & 1)
        keys = k_smem.index(slot).reshape([BLOCK_N, D]).permute((1, 0))
        scores = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_empty.index(slot), count=1)
        scores = cut(scores, first, row_low, row_high, full_low, full_high)
        nothing = gl.full([ROWS], float("-inf"), gl.float32, s_rows)
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
            mbarrier.arrive(k_empty.index(slot), count=1)
            scores = cut(scores, n, row_low, row_high, full_low, full_high)
            weights, decay, top = weigh(scores, top, outer)
            sums = lane_sums(weights)
            lane_decay = gl.convert_layout(decay, gl.SliceLayout(1, sums.type.layout))
            total = total * lane_decay[:, None] + sums
            after = it + 1
            more = n + BLOCK_N < last
            mbarrier.wait(k_full.index(after % STAGES), (after // STAGES) & 1, pred=more)
            acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
            mbarrier.arrive(v_empty.index(before), count=1)
            acc = rescale(acc, gl.convert_layout(decay, o_rows))
            p = gl.convert_layout(weights.to(dtype), p_layout)
        if not KEEP_Q:
            mbarrier.arrive(q_empty, count=1)
        slot = it % STAGES
        mbarrier.wait(v_full.index(slot), (it // STAGES) & 1)
        acc = warpgroup_mma(p, v_smem.index(slot).reshape([BLOCK_N, D]), acc, is_async=True)
        total = gl.convert_layout(gl.sum(total, 1), s_rows)
        share = 1.0 / gl.where(total == 0.0, 1.0, total)
        place = plane.to(gl.int64) * num_queries + rows
        gl.store(lse_ptr + place, top + gl.log2(total), mask=inside)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(slot), count=1)
        it += 1
        if SKIP:
            for _ in range(last, past, BLOCK_N):
                slot = it % STAGES
                mbarrier.wait(k_full.index(slot), (it // STAGES) & 1)
                mbarrier.arrive(k_empty.index(slot), count=1)
                mbarrier.wait(v_full.index(slot), (it // STAGES) & 1)
                mbarrier.arrive(v_empty.index(slot), count=1)
                it += 1
        acc = acc * gl.convert_layout(share, o_rows)[:, None]
        _leave(acc.to(dtype), o_desc, o_tile, plane // HEADS, plane % HEADS, row)
        turn += 1
        item = _given(drawn, turn) if DYNAMIC else item + gl.num_programs(0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_queries", "items"])
def _mixed_attention_fwd_hopper_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, counter_ptr, start, end, outer, num_queries, items,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SECTION: gl.constexpr, GROUPS: gl.constexpr,
    DYNAMIC: gl.constexpr, SKIP: gl.constexpr, KEEP_Q: gl.constexpr,
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
                    KEEP_Q, 0,
                )),
                (_consume, (
                    consumed, HEADS, D, BLOCK_M, BLOCK_N, STAGES, SECTION, GROUPS, DYNAMIC, SKIP,
                    KEEP_Q, 1,
                )),
                (_produce, (
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
                    KEEP_Q, 0,
                )),
                (_consume, (
                    consumed, HEADS, D, BLOCK_M, BLOCK_N, STAGES, SECTION, GROUPS, DYNAMIC, SKIP,
                    KEEP_Q, 1,
                )),
                (_consume, (
                    consumed, HEADS, D, BLOCK_M, BLOCK_N, STAGES, SECTION, GROUPS, DYNAMIC, SKIP,
                    KEEP_Q, 2,
                )),
                (_produce, (
                    produced, HEADS, GROUP, D, BLOCK_M, BLOCK_N, STAGES, SECTION, GROUPS, DYNAMIC,
                )),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


def hopper_fwd(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, scale: float,
    out: Tensor, lse: Tensor, picked: HopperForwardConfig,
) -> None:  # fmt: skip
    """Write output and base-2 log-sum-exp to ``out`` and ``lse``."""
    batch, heads, length, dim = q.shape
    rows, block_n = picked.block_m // picked.groups, picked.block_n
    items = triton.cdiv(length, picked.block_m) * batch * heads
    programs = min(items, torch.cuda.get_device_properties(q.device).multi_processor_count)
    bounds = zip(*by_sample(start, end), strict=True)
    counter = lse
    if picked.dynamic:
        # One of its own for every launch: graphs that are replayed and streams side by side.
        counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    _mixed_attention_fwd_hopper_kernel[(programs,)](
        tile_descriptor(q, rows), tile_descriptor(k, block_n), tile_descriptor(v, block_n),
        tile_descriptor(out, rows, min(dim, 128)), lse, counter, *bounds, scale * LOG2_E, length,
        items, HEADS=heads, GROUP=heads // k.shape[1], D=dim, **picked.constants(), num_warps=4,
    )  # fmt: skip
