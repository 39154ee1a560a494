"""What the forward for sm_90 loads, and in which order: the warp that feeds the others."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .hopper import barrier, of_sample, tma_load


@gluon.jit
def give_out(item, drawn, turn):
    """Tell the multiplying warps which item is next. There are two places for it: what was in this
    one has been read, since the loading warp comes here only after Q of the turn before is free.
    """
    full, smem = drawn
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    smem.index(turn & 1).store(gl.full([1], 0, gl.int32, layout) + item)
    mbarrier.arrive(full.index(turn & 1), count=1)


@gluon.jit
def given(drawn, turn):
    """The item of a turn, from the loading warp."""
    full, smem = drawn
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mbarrier.wait(full.index(turn & 1), (turn >> 1) & 1)
    return gl.max(smem.index(turn & 1).load(layout), 0)


@gluon.jit
def item_of(
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
def produce(
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
            give_out(item, drawn, turn)
        plane, row, low, high, first, past = item_of(
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
        give_out(item, drawn, turn)
